"""The targets of an evaluation: the defence, and the plain classifier beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from msa_eval.data import Samples
from msa_eval.defense.contract import Defense, WholeModel, as_defense, left_training, modules_of
from msa_eval.defense.micro_batches import in_parts
from msa_eval.defense.own_forward import IMAGES, counted
from msa_eval.defense.weight_gradients import find_own_gradients
from msa_eval.device import onto


def make_targets(
    target: object,
    fc: object,
    samples: Samples,
    device: str,
    *,
    micro_batch: int | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Defense]:
    """The defence and the plain classifier beside it, on the device, sparing with memory.

    Of the same target and data the same is made everywhere: a model counts by its trunk and its decision, or whole (see
    `msa_eval.defense.own_forward`).

    Args:
        target: the defence.
        fc: the plain classifier; by default (``None``) the defence's own ``fc_target``, if it has one; ``False`` for
            none.
        samples: the whole data set, of which the first images are passed.
        device: where to compute; modules are moved there.
        micro_batch: pass at most so many images through a trunk at once.
        only: the targets that results are of: a defence's own ``fc_target`` is left out where it is not among them. A
            classifier that is given stays, so that results of other targets are found out.

    Raises:
        ValueError: when either is no model, or parts are asked of a defence without a trunk.
    """
    if fc is None and (only is None or "fc" in only):
        fc = getattr(target, "fc_target", None)

    def images() -> Tensor:  # decoded where they are asked for alone
        return samples.images(torch.arange(min(IMAGES, micro_batch or IMAGES, len(samples))))

    defense = _counted(target, images, device)
    targets = {"defense": in_parts(defense, micro_batch)}
    if fc is not None and fc is not False:
        classifier = _counted(fc, images, device)
        targets["fc"] = in_parts(classifier, None if isinstance(classifier, WholeModel) else micro_batch)
    # Noise serves as well as the data here, and no image is decoded for it but the first, whose shape it has.
    noise = torch.rand((min(IMAGES, micro_batch or IMAGES), *samples.shape), generator=torch.Generator().manual_seed(0))
    for one in targets.values():
        find_own_gradients(one, onto(noise, device))
    return targets


def _counted(target: object, images: Callable[[], Tensor], device: str) -> Defense:
    """The defence that a target is, on the device."""
    defense = as_defense(target)
    for module in modules_of(defense):
        if any(
            isinstance(weight, UninitializedParameter | UninitializedBuffer)
            for weight in (*module.parameters(), *module.buffers())
        ):
            raise ValueError("the model has lazy layers, which take their size from a first batch; pass one through it")
        if any(weight.is_meta for weight in (*module.parameters(), *module.buffers())) and device != "meta":
            raise ValueError("the model lies on the meta device, which holds no values; load its weights first")
        module.to(device)
        _leave_inference_mode(module)
    if isinstance(defense, WholeModel):
        return defense
    return counted(defense, onto(images(), device))


def _leave_inference_mode(module: nn.Module) -> None:
    """Make weights anew that were made in inference mode, since no gradient passes by such weights."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.is_inference():
                part._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and value.is_inference():
                part._buffers[name] = value.clone()


def remarks(targets: Mapping[str, Defense]) -> list[str]:
    """What a user should know of how targets are evaluated, a sentence each."""
    found = [
        f"the {name} is evaluated as a whole, without a trunk, because {why}; every query costs a pass of all of it"
        for name, why in why_whole(targets).items()
    ]
    for name, defense in targets.items():
        if isinstance(defense, WholeModel) and not isinstance(defense.model, nn.Module):
            kind = getattr(defense.model, "__name__", type(defense.model).__name__)
            found.append(f"the {name} is {kind}, which is taken for a function from images to logits")
        if any(is_compiled(part) for module in modules_of(defense) for part in module.modules()):
            found.append(f"the {name} was compiled; it is evaluated as it was written")
        if left := left_training(defense):
            found.append(f"parts of the {name} are in training mode: {', '.join(left[:5])}")
    return found


def answers(defense: Defense) -> str:
    """Which of a target's answers its logits are, where it answers with more than one."""
    return str(getattr(defense, "note", ""))


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run what ``torch.compile`` made of it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def why_whole(targets: Mapping[str, Defense]) -> dict[str, str]:
    """Of each target that counts whole though it has a trunk, why it does."""
    return {name: one.why for name, one in targets.items() if isinstance(one, WholeModel) and one.why}
