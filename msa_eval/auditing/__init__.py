"""Whether a robustness figure can be believed: short measurements of a target, and the signs they give."""
