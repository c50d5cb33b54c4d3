"""Targets by name: everything that can be evaluated, audited, verified or fine-tuned, with the same words everywhere.

A word is

- ``hpm.safetensors``: a checkpoint of this toolkit;
- ``module:callable`` or ``path/to/file.py:callable``: the user's own code, which is imported and called;
- ``robustbench:NAME[@dataset][/norm]``, ``torchvision:NAME[@WEIGHTS]``, ``timm:NAME[.TAG]``: a third-party model;
- ``hf:OWNER/NAME`` or ``hf:FOLDER``: an image classifier of Hugging Face's transformers.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msa_eval.data import Samples
from msa_eval.defense.architectures import Blueprint
from msa_eval.defense.contract import WholeModel, as_defense, has_trunk, modules_of, own_surrogates
from msa_eval.hashing import file_hash
from msa_eval.targets import code
from msa_eval.targets.building import RANDOM, Built, Wanted
from msa_eval.targets.checkpoint import load_checkpoint
from msa_eval.targets.cut import CantSplitError, Trunk
from msa_eval.targets.splitting import split
from msa_eval.targets.target import Target
from msa_eval.targets.weights import describe_file, load_weights, read_weights
from msa_eval.targets.zoos import ZOOS
from msa_eval.untrusted import printable

PACKAGES = {"hf": "transformers"}
"""The package of a family of targets by name, where that has another name."""


def load_target(
    word: str | Path,
    example: Samples | Tensor | None = None,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    head: str | None = None,
    whole: bool = False,
    models: str | Path = "models",
    trunk: str | None = None,
    mean: Sequence[float] | Literal["none"] | None = None,
    std: Sequence[float] | None = None,
) -> Target:
    """Make a target of its name.

    A plain model is split into trunk and head (see `msa_eval.targets.splitting.split`), so that attacks share its
    passes; where that can't be done it stays whole, and its ``why`` says for which reason.

    Args:
        word: see this module.
        example: some images of those it will get, to split it with.
        weights: a file for a model by name or of the user's own: safetensors, or ``torch.load(weights_only=True)``;
            ``FILE:KEY`` where it holds several sets.
        random_weights: leave a model by name untrained; results say so.
        head: the name of the layer to split at.
        whole: do not split.
        models: the folder of robustbench's weights.
        trunk: where the user's own code lies that a checkpoint was made from; without it such code is not imported.
        mean: of each channel, for the normalisation in front of a model of torchvision or timm, in place of its own;
            ``"none"`` leaves the normalisation out.
        std: of each channel.

    Raises:
        ValueError: when there is no such target, with what to do.
    """
    word = str(word)
    family, _, name = word.partition(":")
    normalization = _normalization(mean, std)
    wanted = Wanted(weights, random_weights, Path(models), normalization=normalization)
    if weights is not None and random_weights:
        raise ValueError("give a weights file or random weights, not both")
    if family in ZOOS and name:
        if trunk is not None:
            raise ValueError("a trunk of your own code belongs to a checkpoint made from it")
        made = _by_name(word, example, ZOOS[family](name, wanted), head, whole)
        if normalization is None or made.blueprint is None:
            return made
        arguments = {**made.blueprint.arguments, "normalization": normalization}
        return replace(made, blueprint=replace(made.blueprint, arguments=arguments))
    if _is_checkpoint(word):
        given = {"weights": weights, "random weights": random_weights, "a head": head, "a whole model": whole,
                 "a normalisation": normalization}  # fmt: skip
        if wrong := [what for what, value in given.items() if value]:
            raise ValueError(f"{word} is a checkpoint, which is complete in itself; it can't be given {wrong[0]}")
        return _checkpoint(Path(word), trunk)
    if ":" in word and name:
        if trunk is not None or random_weights:
            raise ValueError(f"{word} is your own code; it takes neither random weights nor a trunk")
        if normalization is not None:
            raise ValueError(f"{word} is your own code; put the normalisation inside its model")
        return _own(word, example, weights, head, whole)
    raise ValueError(_no_such_target(word))


def resolve(target: object, samples: Samples) -> tuple[object, Mapping[str, Any] | None]:
    """What to evaluate and what to say of it: words are loaded, targets unpacked, and all else stays as it is."""
    target = named(target, samples)
    return (target.model, target.about) if isinstance(target, Target) else (target, None)


def named(target: object, samples: Samples) -> object:
    """Load a target that is given by its name; all else stays as it is."""
    return load_target(target, samples) if isinstance(target, str | Path) else target


def _checkpoint(path: Path, trunk: str | None) -> Target:
    loaded = load_checkpoint(path, trunk=trunk)
    about = {"word": path.name, "kind": "checkpoint", **describe_file(path)}
    origins = list(_origins(loaded.history))
    if "target" in loaded.history:
        about |= {"target": loaded.history["target"]}
    notes: list[str] = []
    if any(origin.get("random_weights") for origin in origins):
        about |= {"random_weights": True}
        notes += [f"{path.name} was made of random weights: these numbers say nothing about the trained model"]
    if trunk is not None:
        about |= {"imported": _short(trunk)}
        notes += [f"imported your own code: {trunk}"]
        file = code.source(trunk)
        found = None if file is None else file_hash(file)
        about |= {} if found is None else {"code_sha256": found}
        made_of = {origin["code_sha256"] for origin in origins if "code_sha256" in origin}
        if made_of - {found}:
            notes += [f"{trunk} is not the file that {path.name} was made from: its SHA-256 differs"]
    return Target(loaded.model, path.name, about, loaded.blueprint, tuple(notes), loaded.history)


def _origins(history: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a checkpoint notes of its making, of what it was made from, and so on."""
    while isinstance(history, Mapping):
        yield history
        history = history.get("target", None)


def _by_name(word: str, example: Samples | Tensor | None, built: Built, head: str | None, whole: bool) -> Target:
    family = word.partition(":")[0]
    random = built.about.get("weights") == RANDOM
    package = PACKAGES.get(family, family)
    release = f"{package} {importlib.metadata.version(package)}"
    about = {"word": word, "kind": family, "package": release, **built.about, "random_weights": random}
    images = _images(example)
    notes = [f"{word} has random weights: these numbers say nothing about the trained model"] if random else []
    notes += built.notes
    if images is not None and images.shape[1] != 3:
        raise ValueError(f"{word} takes images of 3 channels, but these have {images.shape[1]}")
    if built.size is not None and images is not None and images.shape[-1] != built.size:
        notes += [
            f"{word} was made for images of {built.size}x{built.size}, but gets {images.shape[-2]}x{images.shape[-1]}"
        ]
        _check_size(word, built.model, images)
    if images is None:
        images = torch.rand(2, 3, *2 * [built.size or 224], generator=torch.Generator().manual_seed(0))
    return _split(word, word, built.model, images, head, whole, about, notes)


def _check_size(word: str, model: nn.Module, images: Tensor) -> None:
    """Find out whether a model takes images of a size that it was not made for: some do, some don't."""
    try:
        with torch.no_grad():
            model(images[:1].clone())
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        raise ValueError(f"{word}: the model can't take images of shape {shape}: {printable(error)}") from error


def _own(
    word: str, example: Samples | Tensor | None, weights: str | Path | None, head: str | None, whole: bool
) -> Target:
    made, file = code.make(word)
    short = _short(word)
    about: dict[str, Any] = {"word": short, "kind": "code", "imported": short}
    if file is not None and file.is_file():
        about |= {"code_sha256": describe_file(file)["weights_sha256"]}
    notes = [f"imported your own code: {word}" + ("" if file is None else f" ({file})")]
    if weights is not None:
        modules = modules_of(made)
        if len(modules) != 1:
            raise ValueError(f"{word} is made of {len(modules)} modules; let it load its weights itself")
        held = read_weights(weights)
        notes += [*held.notes, *load_weights(modules[0], held.tensors, source=str(weights))]
        about |= held.about
    if has_trunk(made):
        if head is not None:
            raise ValueError(f"{word} is a defence with a trunk of its own; it takes no head")
        return Target(
            WholeModel(made) if whole and isinstance(made, nn.Module) else made, short, about, None, tuple(notes)
        )
    if not isinstance(made, nn.Module):
        if head is not None:
            raise ValueError(f"{word} is a function from images to logits, which has no head")
        return Target(as_defense(made), short, about, None, tuple(notes))
    if own_surrogates(made):  # which take images, not the features of a trunk
        whole, notes = True, [*notes, f"kept whole, with its own surrogates: {', '.join(own_surrogates(made))}"]
    images = _images(example)
    if images is None and not whole:
        raise ValueError(f"give some images with {word}, to split it into trunk and head")
    return _split(word, short, made, images, head, whole, about, notes)


def _split(
    word: str,
    short: str,
    model: nn.Module,
    images: Tensor | None,
    head: str | None,
    whole: bool,
    about: Mapping[str, Any],
    notes: list[str],
) -> Target:
    if whole:
        if head is not None:
            raise ValueError("a model that stays whole has no head; give one or the other")
        return Target(WholeModel(model), short, {**about, "cut": None}, None, tuple(notes))
    assert images is not None
    try:
        classifier = split(model, images, head=head)
    except CantSplitError as error:
        if head is not None:
            raise ValueError(f"{word}: {error}") from error
        return Target(WholeModel(model, why=error.reason), short, {**about, "cut": None}, None, tuple(notes))
    except ValueError as error:
        raise ValueError(f"{word}: {error}") from error
    assert isinstance(classifier.trunk, Trunk)
    cut = classifier.trunk.cut
    after = "" if cut.post is None else f"; {cut.post} follows and stays part of the decision"
    notes = [*notes, f"split at layer {cut.head!r}, {cut.features} features, {cut.classes} classes{after}"]
    blueprint = Blueprint(short, {"cut": asdict(cut)}, cut.classes)
    return Target(classifier, short, {**about, "cut": asdict(cut)}, blueprint, tuple(notes))


def _normalization(
    mean: Sequence[float] | Literal["none"] | None, std: Sequence[float] | None
) -> Mapping[str, Sequence[float]] | None:
    """The normalisation that is asked for; ``None`` for the model's own.

    Raises:
        ValueError: when one half of it is missing, or is not three numbers.
    """
    if mean == "none":
        if std is not None:
            raise ValueError("mean=none leaves the normalisation out; give no std with it")
        return {"mean": [0.0] * 3, "std": [1.0] * 3}
    if mean is None and std is None:
        return None
    if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"expected mean and std of 3 channels, std above 0, but got mean {mean} and std {std}")
    return {"mean": [*mean], "std": [*std]}


def _images(example: Samples | Tensor | None) -> Tensor | None:
    return example.images(torch.arange(min(2, len(example)))) if isinstance(example, Samples) else example


def _short(word: str) -> str:
    """A word without its folders, which say nothing to others."""
    place, separator, name = word.rpartition(":")
    return f"{Path(place).name}{separator}{name}" if place.endswith(".py") else word


_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def _is_checkpoint(word: str) -> bool:
    """Whether a word can only mean a checkpoint, there or not: a file's name that is not of another kind."""
    path = Path(word)
    return path.suffix == ".safetensors" or (
        ":" not in word and path.suffix not in (".py", *_PICKLES) and (path.is_file() or len(path.parts) > 1)
    )


def _no_such_target(word: str) -> str:
    path = Path(word)
    if path.suffix in _PICKLES:
        return f"{word} alone does not say its architecture; give a model, as torchvision:NAME, with weights={word}"
    if path.suffix == ".py":
        return f"{word} names no function; give {word}:FUNCTION"
    close = difflib.get_close_matches(word.partition(":")[0], [*ZOOS], n=1)
    hint = f"; did you mean {close[0]}:NAME?" if close else ""
    return (
        f"there is no target {word!r}{hint}; expected a .safetensors checkpoint, module:callable, "
        f"path/to/file.py:callable, robustbench:NAME[@dataset], torchvision:NAME, timm:NAME or hf:NAME_OR_FOLDER"
    )
