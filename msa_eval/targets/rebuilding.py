"""A classifier built again from what a checkpoint says of it."""

from __future__ import annotations

from torch import nn

from msa_eval.defense.architectures import Blueprint, Classifier
from msa_eval.targets import code
from msa_eval.targets.building import Wanted
from msa_eval.targets.cut import Cut
from msa_eval.targets.zoos import ZOOS


def rebuild(blueprint: Blueprint, *, trunk: str | None = None) -> Classifier:
    """Build the classifier of a checkpoint that was made from a target by name, with random weights.

    Args:
        blueprint: its ``architecture`` is the target's word, its ``arguments`` hold where it was cut.
        trunk: see `load_target`.

    Raises:
        ValueError: when it can't be built, or would import the user's code unasked.
    """
    cut = Cut(**blueprint.arguments["cut"])
    family, _, name = blueprint.architecture.partition(":")
    if family in ZOOS:
        classes = None if family == "robustbench" else blueprint.num_classes
        changed = blueprint.arguments.get("normalization")
        return cut.apply(ZOOS[family](name, Wanted(random=True, classes=classes, normalization=changed)).model)
    if trunk is None:
        raise ValueError(
            f"its trunk is code of your own, {blueprint.architecture}; loading it runs that code: allow it with "
            f"trunk=path/to/{blueprint.architecture}"
        )
    made, _ = code.make(trunk)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{trunk} returned a {type(made).__name__}, not the model that the checkpoint was made from")
    return cut.apply(made.eval())
