"""A protocol on a target, from start to results."""
