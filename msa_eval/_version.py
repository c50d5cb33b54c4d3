"""The version of the package, apart from all else so that any file can import it."""

__version__ = "0.2.0"
