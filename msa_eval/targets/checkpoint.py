"""Checkpoints: one safetensors file that carries all an evaluation needs.

The tensors are a model's ``state_dict``. The file's metadata holds the format and its version, the kind of model,
its blueprint and, for HPM, its momentum and variant. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msa_eval.defense.architectures import Blueprint, Classifier
from msa_eval.hpm.model import HPM, Variant
from msa_eval.targets.cut import Cut
from msa_eval.targets.weights import misfits, read_safetensors, write_safetensors
from msa_eval.untrusted import printable

FORMAT = "msa-eval"


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: in evaluation mode, without weight gradients.
        blueprint: its architecture.
        history: what made it, as written by its maker.
    """

    model: HPM | Classifier
    blueprint: Blueprint
    history: Mapping[str, Any]

    @property
    def classifier(self) -> Classifier:
        """The plain classifier: the model itself, or the one that HPM was built on."""
        return self.model.fc_target if isinstance(self.model, HPM) else self.model


def save_checkpoint(
    path: str | Path, model: HPM | Classifier, blueprint: Blueprint, *, history: Mapping[str, Any] | None = None
) -> None:
    """Write a model and all that is needed to rebuild it to one safetensors file.

    Args:
        path: the file to write; it appears whole or not at all.
        model: an `HPM` or `Classifier` that was built from ``blueprint``.
        blueprint: its architecture.
        history: JSON-like notes on how it was made.

    Raises:
        OSError: when the file can't be written.
    """
    about: dict[str, Any] = {"kind": "classifier", "blueprint": asdict(blueprint), "history": dict(history or {})}
    if isinstance(model, HPM):
        about |= {"kind": "hpm", "momentum": model.momentum, "variant": asdict(model.variant)}
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "about": json.dumps(about, sort_keys=True)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_safetensors(path, tensors, header)


def load_checkpoint(path: str | Path, *, trunk: str | None = None) -> Checkpoint:
    """Read a checkpoint written by `save_checkpoint`.

    Args:
        path: the file.
        trunk: where the user's own code lies that the checkpoint was made from, as ``module:callable`` or
            ``path/to/file.py:callable``. A checkpoint never imports such code by itself.

    Raises:
        ValueError: when the file is missing, is no such checkpoint, is of a newer format or doesn't fit its own
            description.
    """
    path = Path(path)
    header, tensors = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file but no msa-eval checkpoint; turn a bare classifier into one with "
            f"'msa-eval finetune {path} --architecture ...'"
        )
    if header.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has checkpoint format version {printable(header.get('format_version'))}, but this release reads "
            f"version {FORMAT_VERSION}; use the release of msa-eval that wrote it"
        )
    try:
        about = json.loads(header["about"])
        blueprint = Blueprint(**about["blueprint"])
        if not isinstance(blueprint.architecture, str) or not isinstance(blueprint.arguments, Mapping):
            raise ValueError("its blueprint is none")
        if not isinstance(about.get("history", {}), Mapping):
            raise ValueError("its history is none")
        (_check_cut if blueprint.by_name else _check_shapes)(blueprint, tensors)
        classifier = None if blueprint.by_name else _build_quietly(blueprint)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} does not fit its own description: {printable(error)}") from error
    if classifier is None:
        classifier = _rebuilt(path, blueprint, trunk)
    elif trunk is not None:
        raise ValueError(f"{path} was not made from code of your own; it takes no trunk")
    try:
        model = _build(about, classifier)
        _check_tensors(model, tensors)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit its own description: {printable(error)}") from error
    return Checkpoint(model.eval().requires_grad_(False), blueprint, about.get("history", {}))


def load_bare_classifier(
    path: str | Path,
    architecture: str,
    arguments: Mapping[str, Any],
    *,
    normalization: Mapping[str, Any] | None = None,
    head: str = "fc",
) -> Checkpoint:
    """Read a bare classifier: a safetensors file that holds only a state dict, trunk and head side by side.

    Args:
        path: the file; names that begin with ``module.`` (data parallel) lose that prefix.
        architecture: the trunk's name.
        arguments: the trunk's arguments.
        normalization: ``{"mean": [...], "std": [...]}``, where the classifier expects normalised images.
        head: the name of the fully connected layer in the file; its rows tell the number of classes.

    Raises:
        ValueError: when the file can't be read or its tensors don't fit the architecture.
    """
    path = Path(path)
    _, tensors = read_safetensors(path)
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    weight = tensors.get(f"{head}.weight")
    if weight is None or weight.ndim != 2:
        raise ValueError(f"{path} has no fully connected layer {head!r}; name it with head=NAME")
    blueprint = Blueprint(architecture, arguments, num_classes=len(weight), normalization=normalization)
    inner = "trunk." if normalization is None else "trunk.1."
    renamed = {
        "fc." + name.removeprefix(head + ".") if name.startswith(head + ".") else inner + name: value
        for name, value in tensors.items()
    }
    model = _build_quietly(blueprint)
    try:
        _check_tensors(model, renamed)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {architecture} {dict(arguments)}: {error}") from error
    model.load_state_dict(renamed)
    return Checkpoint(model.eval().requires_grad_(False), blueprint, {"file": path.name})


def _build_quietly(blueprint: Blueprint) -> Classifier:
    """Build without a trace in the global random state: the weights are overwritten anyway."""
    with torch.random.fork_rng(devices=[]):
        return blueprint.build()


def _check_shapes(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> None:
    """Hold an architecture's shapes to the file's, before anything is allocated."""
    with torch.device("meta"):
        expected = blueprint.build().state_dict()
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape:
            held = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"{name} is {held}, not {tuple(value.shape)}")


def _rebuilt(path: Path, blueprint: Blueprint, trunk: str | None) -> Classifier:
    from msa_eval.targets.rebuilding import rebuild

    try:
        return rebuild(blueprint, trunk=trunk)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {printable(error)}") from error


def _check_cut(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> None:
    """Hold a cut to the head that the file has, before anything is allocated."""
    cut = Cut(**blueprint.arguments["cut"])
    head = tensors.get("fc.weight")
    if cut.classes != blueprint.num_classes:
        raise ValueError(f"it was cut at {cut.classes} classes, but says {blueprint.num_classes}")
    if head is None or head.shape != (cut.classes, cut.features):
        held = "none" if head is None else "x".join(map(str, head.shape))
        raise ValueError(f"it was cut at a head of {cut.classes}x{cut.features}, but holds {held}")


def _build(about: Mapping[str, Any], classifier: Classifier) -> HPM | Classifier:
    if about["kind"] == "classifier":
        return classifier
    if about["kind"] != "hpm":
        raise ValueError(f"unknown kind of model {about['kind']!r}; available: classifier, hpm")
    return HPM(classifier.trunk, classifier.fc, momentum=about["momentum"], variant=Variant(**about["variant"]))


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if wrong := misfits(model, tensors):
        raise ValueError(wrong)
