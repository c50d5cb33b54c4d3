"""One run on one batch: passes and verdicts, by the target itself."""
