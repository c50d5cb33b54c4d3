"""The targets of an evaluation: the defence, and the plain classifier beside it."""

from __future__ import annotations

from collections.abc import Collection

from msa_eval.defense import Defense, WholeModel, as_defense, modules_of
from msa_eval.memory import in_parts


def make_targets(
    target: object,
    fc: object,
    device: str,
    *,
    micro_batch: int | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Defense]:
    """The defence and the plain classifier beside it, on the device, sparing with memory.

    Args:
        target: the defence.
        fc: the plain classifier; by default (``None``) the defence's own ``fc_target``, if it has one; ``False`` for
            none.
        device: where to compute; modules are moved there.
        micro_batch: pass at most so many images through a trunk at once.
        only: the targets that results are of: a defence's own ``fc_target`` is left out where it is not among them. A
            classifier that is given stays, so that results of other targets are found out.

    Raises:
        ValueError: when either is no model, or parts are asked of a defence without a trunk.
    """
    defense = as_defense(target)
    targets = {"defense": in_parts(defense, micro_batch)}
    if fc is None and (only is None or "fc" in only):
        fc = getattr(defense, "fc_target", None)
    if fc is not None and fc is not False:
        classifier = as_defense(fc)
        targets["fc"] = in_parts(classifier, None if isinstance(classifier, WholeModel) else micro_batch)
    for module in (module for made in targets.values() for module in modules_of(made)):
        module.to(device)
    return targets
