"""The model under attack: what the toolkit needs of it, and the ways in which it is passed.

`Defense` is the contract; `as_defense` makes a model fit it.
"""

from msa_eval.defense.contract import Defense, WholeModel, as_defense

__all__ = ["Defense", "WholeModel", "as_defense"]
