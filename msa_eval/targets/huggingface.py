"""Image classifiers of Hugging Face's transformers, by name or from a folder, with their processor's normalisation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from msa_eval.installation.imports import import_transformers
from msa_eval.targets.building import (
    RANDOM,
    Built,
    Wanted,
    normalised,
    plain_weights,
    quietly,
    reason_of,
    same_random,
)
from msa_eval.targets.weights import describe_file, read_weights

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The files that say how images are made ready, the older one first."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class LogitsOf(nn.Module):
    """The logits of a model of transformers.

    Args:
        model: takes ``pixel_values`` ``(B, C, H, W)``, and answers with an object.
        flipped: whether it takes the channels from blue to red.
    """

    def __init__(self, model: nn.Module, *, flipped: bool = False) -> None:
        super().__init__()
        self.model, self.flipped = model, flipped

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, k)``."""
        out: Tensor = self.model(pixel_values=x.flip(1) if self.flipped else x).logits
        return out


def huggingface(name: str, wanted: Wanted) -> Built:
    """An image classifier of transformers: ``OWNER/NAME``, or a folder of ``save_pretrained``, which needs no network.

    Args:
        name: as ``from_pretrained`` takes it.
        wanted: a weights file of its own, or random weights, in place of the published ones.

    Raises:
        ValueError: when there is no such model, it is not an image classifier, its weights are not whole, or its
            processor does more than scale and normalise.
    """
    package = import_transformers()
    folder = Path(name).is_dir()
    if not folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"hf:{name}: there is no folder {name}")
    with _quietly(package), plain_weights():
        try:
            config = package.AutoConfig.from_pretrained(name, local_files_only=folder)
        except (OSError, ValueError) as error:
            raise ValueError(_not_to_be_had(name, error)) from error
        if wanted.classes is not None:
            config.num_labels = wanted.classes
        shown = _processor(package, name, folder)
        own = _normalization(f"hf:{name}", shown) if wanted.normalization is None else {}
        built = _with_weights(package, name, config, wanted, folder)
    model = LogitsOf(built.model, flipped=bool(shown.get("do_flip_channel_order", False)))
    size = _side(shown) or getattr(config, "image_size", None)
    return normalised(replace(built, model=model.eval()), own, size if isinstance(size, int) else None, wanted)


def _with_weights(package: Any, name: str, config: Any, wanted: Wanted, folder: bool) -> Built:
    """The bare model; its own package reads its weights, since it renames those of older releases."""
    kind = package.AutoModelForImageClassification
    bare = _random(kind, name, config) if wanted.random or wanted.file is not None else None
    if bare is not None and wanted.random:
        return Built(bare, None, {"weights": RANDOM})
    held = None if wanted.file is None else read_weights(wanted.file)
    try:
        with same_random():
            if bare is None or held is None:
                model, said = kind.from_pretrained(name, local_files_only=folder, output_loading_info=True)
            else:
                of_file: Any = type(bare)
                model, said = of_file.from_pretrained(
                    None, config=config, state_dict=dict(held.tensors), output_loading_info=True
                )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(_not_to_be_had(name, error)) from error
    mismatched = [str(one[0] if isinstance(one, tuple) else one) for one in said.get("mismatched_keys", ())]
    if lacking := sorted({*said["missing_keys"], *mismatched}):
        raise ValueError(
            f"{wanted.file or f'hf:{name}'} has no weights for {', '.join(lacking[:3])}, which would be random; it may "
            f"not be an image classifier yet: fine-tune and save it first"
        )
    if held is None:
        return Built(model.float(), None, _about(package, name, folder))
    if unknown := sorted(said["unexpected_keys"]):
        raise ValueError(f"{wanted.file} does not fit hf:{name}, which has no {', '.join(unknown[:3])}")
    return Built(model.float(), None, held.about, held.notes)


def _random(kind: Any, name: str, config: Any) -> nn.Module:
    try:
        with same_random():
            model: nn.Module = kind.from_config(config).float()
    except ValueError as error:
        raise ValueError(f"hf:{name} is not an image classifier: {reason_of(error)}") from error
    return model


def _about(package: Any, name: str, folder: bool) -> Mapping[str, Any]:
    """The name and hash of the weights file; of weights in several files, nothing but the model's name."""
    found = (_file(package, name, file, folder) for file in WEIGHTS)
    file = next((one for one in found if one is not None), None)
    return {"weights": Path(name).name} if file is None else describe_file(file)


def _file(package: Any, name: str, file: str, folder: bool) -> Path | None:
    """A file of a model, from its folder, the cache or the network; ``None`` where it has none of that name."""
    try:
        found = package.utils.cached_file(name, file, local_files_only=folder)
    except OSError:
        return None
    return None if found is None else Path(found)


def _processor(package: Any, name: str, folder: bool) -> Mapping[str, Any]:
    """What the model's processor does; empty where nothing is said of it."""
    for file in PROCESSORS:
        place = _file(package, name, file, folder)
        if place is not None:
            said: Mapping[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            inner: Mapping[str, Any] = said.get("image_processor", said)
            return inner
    return {}


def _normalization(word: str, shown: Mapping[str, Any]) -> Mapping[str, list[float]]:
    """Mean and standard deviation of each channel, of images in [0, 1].

    Raises:
        ValueError: when the processor says none, or does more than scale and normalise.
    """
    other = [key for key in ("rescale_offset", "include_top") if shown.get(key)]
    if not shown or other:
        what = f"normalises in a way of its own ({other[0]})" if other else "says nothing of how images are normalised"
        raise ValueError(f"the processor of {word} {what}; give mean=M,M,M std=S,S,S of images in [0, 1]")
    scale = 255 * float(shown.get("rescale_factor", 1 / 255)) if shown.get("do_rescale", True) else 255.0
    if shown.get("do_normalize", "image_mean" in shown):
        if "image_mean" not in shown or "image_std" not in shown:
            raise ValueError(f"the processor of {word} names no mean; give mean=M,M,M std=S,S,S of images in [0, 1]")
        mean, std = (_channels(shown[key]) for key in ("image_mean", "image_std"))
    else:
        mean, std = [0.0] * 3, [1.0] * 3
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}


def _channels(value: Any) -> list[float]:
    values = [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)]
    return values * 3 if len(values) == 1 else values


def _side(shown: Mapping[str, Any]) -> int | None:
    """The side of the square images that a processor makes, if it makes such."""
    size = shown.get("crop_size" if shown.get("do_center_crop") else "size")
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    return size if isinstance(size, int) else None


def _not_to_be_had(name: str, error: Exception) -> str:
    return (
        f"hf:{name} can't be loaded ({reason_of(error)}); give the name of an image classifier as OWNER/NAME, or the "
        f"folder that its save_pretrained and its processor's wrote"
    )


@contextmanager
def _quietly(package: Any) -> Iterator[None]:
    """None of what transformers says on the way; its settings are left as they were."""
    logging = package.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quietly():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
