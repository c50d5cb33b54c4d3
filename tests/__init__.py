"""The tests, as a package, so that no other of that name is taken for it."""
