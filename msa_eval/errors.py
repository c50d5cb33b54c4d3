"""What ends an evaluation though its user made no mistake."""


class AttackError(RuntimeError):
    """An attack or a defence failed in a way that must never read as robustness."""
