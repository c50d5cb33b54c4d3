"""Surrogates that are found, for targets that bring none: the target's own code, its stages, or averages of it."""
