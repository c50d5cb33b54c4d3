"""The parts of .ci/run as tasks: ``nox -l`` lists them, ``nox -s lint`` runs one."""

import nox

nox.options.sessions = ["lint", "types", "doctests", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after ``--`` go to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def doctests(session: nox.Session) -> None:
    """Run the examples of all docstrings."""
    session.install(".[test]")
    session.run("pytest", "-n", "0", "--quiet", "--doctest-modules", "--pyargs", "msa_eval")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, against an installed copy: two folders of the package stand beside it."""
    session.install(".[dev]")
    session.run("pip", "install", "--quiet", "--no-deps", "--target", "build/typed", "--upgrade", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site."""
    session.install(".[docs]")
    session.run("mkdocs", "build", "--strict")
