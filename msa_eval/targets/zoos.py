"""Models of robustbench, torchvision, timm and transformers by name, with their own preprocessing.

Normalisation becomes part of the model, so that it takes images in [0, 1]. Weights are read by
``torch.load(weights_only=True)`` or from safetensors only.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from msa_eval.installation.imports import import_robustbench, import_timm, import_torchvision
from msa_eval.targets.building import RANDOM, Built, Wanted, normalised, plain_weights, quietly, reason_of, same_random
from msa_eval.targets.huggingface import huggingface
from msa_eval.targets.weights import describe_file, load_weights, other_classes, read_plain, read_weights


def torchvision(name: str, wanted: Wanted) -> Built:
    """A classifier of torchvision: ``NAME``, or ``NAME@WEIGHTS`` for other weights than its best.

    Raises:
        ValueError: when there is no such model, or its weights are not to be had.
    """
    import_torchvision()
    from torchvision import models  # type: ignore[import-untyped, import-not-found, unused-ignore]

    name, _, tag = name.partition("@")
    _known(name, models.list_models(module=models), "torchvision")
    kinds = models.get_model_weights(name)
    _known(tag or "DEFAULT", ["DEFAULT", *kinds.__members__], f"weights of torchvision:{name}")
    weights = kinds[tag or "DEFAULT"]
    # What torchvision's own builders set beside pretrained weights.
    plain: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        plain = {"transform_input": True, "init_weights": False}
    elif name.startswith("vit_"):
        plain = {"image_size": weights.meta["min_size"][0]}

    def build(classes: int | None) -> nn.Module:
        model: nn.Module = models.get_model(name, weights=None, **plain, **_classes(classes))
        return model

    cached = _hub_folder() / Path(urlparse(weights.url).path).name
    filled = _filled(
        build, f"torchvision:{name} ({weights.name})", wanted, cached, fetch=lambda: _download(weights.url, cached)
    )
    shown = weights.transforms()
    return normalised(filled, {"mean": shown.mean, "std": shown.std}, int(shown.crop_size[0]), wanted)


def timm(name: str, wanted: Wanted) -> Built:
    """A model of timm: ``NAME``, or ``NAME.TAG`` for other weights than its default.

    Raises:
        ValueError: when there is no such model, or its weights are not to be had.
    """
    package: Any = import_timm()
    plain, _, tag = name.partition(".")
    _known(plain, package.list_models(), "timm")
    if tag:
        _known(name, package.list_pretrained(f"{plain}.*"), "timm")

    def build(classes: int | None) -> nn.Module:
        with quietly():
            model: nn.Module = package.create_model(name, pretrained=False, **_classes(classes))
        return model

    found = package.models.get_pretrained_cfg(name)
    if found is None:
        raise ValueError(f"timm says nothing of the images that {name} takes; give it as code of your own")
    cfg: Mapping[str, Any] = found.to_dict()
    full = ".".join(part for part in (plain, cfg.get("tag")) if part)
    cached = _hub_folder() / f"{full}.safetensors"

    def fetch() -> Path:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        repository = cfg.get("hf_hub_id")
        if not repository:
            raise ValueError("timm names no place to get them from")
        repository = repository if not repository.endswith("/") else repository + full
        held = try_to_load_from_cache(repository, "model.safetensors")
        return Path(held) if isinstance(held, str) else _download(hf_hub_url(repository, "model.safetensors"), cached)

    filled = _filled(build, f"timm:{full}", wanted, cached, fetch=fetch, adapt=_timm_filter)
    return normalised(filled, {"mean": cfg["mean"], "std": cfg["std"]}, int(cfg["input_size"][-1]), wanted)


def robustbench(name: str, wanted: Wanted) -> Built:
    """A model of robustbench: ``NAME[@dataset][/norm]``; what it normalises, it normalises itself.

    Raises:
        ValueError: when there is no such model, or its weights are not to be had.
    """
    import_robustbench()
    from robustbench.model_zoo import model_dicts  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from robustbench.utils import load_model  # type: ignore[import-untyped, import-not-found, unused-ignore]

    name, dataset, norm = _robustbench_name(name, model_dicts)
    word = f"robustbench:{name}@{dataset}/{norm}"
    entry = next(kinds[key] for ds, kinds in model_dicts.items() if ds.value == dataset for key in kinds
                 if key.value == norm)[name]  # fmt: skip
    about = {"preprocessing": entry.get("preprocessing")} if entry.get("preprocessing") else {}
    size = {"cifar10": 32, "cifar100": 32}.get(dataset)
    packaged = _comes_with_weights(name, dataset, norm)
    if packaged and wanted.file is not None:
        raise ValueError(f"{word} is built with its pretrained weights by its own package; it takes no weights file")
    if wanted.random:
        try:
            with quietly(), same_random(), plain_weights():
                model: nn.Module = entry["model"]()
        except (OSError, RuntimeError, ImportError) as error:
            raise ValueError(f"{word} can't be built without its pretrained weights: {reason_of(error)}") from error
        return Built(model.eval(), size, {**about, "weights": RANDOM})
    place = wanted.folder / dataset / norm / f"{name}.pt"
    parts = [place] if not isinstance(entry["gdrive_id"], list) else [
        place.with_name(f"{place.name}_m{i}.pt") for i in range(len(entry["gdrive_id"]))
    ]  # fmt: skip
    if wanted.normalization is not None:
        raise ValueError(f"{word} normalises its images itself; leave mean and std out")
    if wanted.file is not None and len(parts) > 1:
        raise ValueError(f"{word} is an ensemble of {len(parts)} files; put {parts[0].name}, ... into {place.parent}")
    parts = [] if packaged else parts
    for part in parts:
        if wanted.file is None and part.is_file():
            read_plain(part)
    with tempfile.TemporaryDirectory() as scratch, quietly(), plain_weights():
        folder = wanted.folder
        if wanted.file is not None:
            folder = Path(scratch)
            own = folder / dataset / norm / place.name
            own.parent.mkdir(parents=True)
            _as_torch_file(Path(wanted.file), own)
        held = not packaged and all(part.is_file() for part in parts)
        try:
            model = load_model(name, model_dir=folder, dataset=dataset, threat_model=norm)
        except Exception as error:
            reason = reason_of(error)
            if wanted.file is not None or held:
                raise ValueError(f"{wanted.file or place} does not fit {word}: {reason}") from error
            if packaged:
                raise ValueError(f"{word} fetches its weights from its own package's place: {reason}") from error
            raise ValueError(_not_to_be_had(word, [p for p in parts if not p.is_file()], reason)) from error
    files = [Path(wanted.file)] if wanted.file is not None else [part for part in parts if part.is_file()]
    return Built(model.eval(), size, {**about, **(describe_file(files[0]) if files else {"weights": "its package's"})})


def full_name(name: str) -> str:
    """The whole word ``robustbench:NAME@dataset/norm`` of a model of robustbench.

    Raises:
        ValueError: when there is no such model.
    """
    import_robustbench()
    from robustbench.model_zoo import model_dicts

    name, dataset, norm = _robustbench_name(name, model_dicts)
    return f"robustbench:{name}@{dataset}/{norm}"


ZOOS: Mapping[str, Callable[[str, Wanted], Built]] = {
    "robustbench": robustbench,
    "torchvision": torchvision,
    "timm": timm,
    "hf": huggingface,
}


def _robustbench_name(name: str, model_dicts: Mapping[Any, Mapping[Any, Mapping[str, Any]]]) -> tuple[str, str, str]:
    name, _, norm = name.partition("/")
    name, _, dataset = name.partition("@")
    zoo = {ds.value: {key.value: list(models) for key, models in kinds.items()} for ds, kinds in model_dicts.items()}
    norm = norm or "Linf"
    if dataset:
        _known(dataset, zoo, "data set of robustbench")
    holding = [ds for ds, kinds in zoo.items() if name in kinds.get(norm, ()) and dataset in ("", ds)]
    if not holding:
        sets = [dataset] if dataset else [*zoo]
        _known(norm, {key for ds in sets for key in zoo[ds]}, "threat model of robustbench")
        where = f" for {dataset or 'any data set'}/{norm}"
        _known(name, sorted({n for ds in sets for n in zoo[ds].get(norm, ())}), "robustbench" + where)
    return name, holding[0], norm


def _comes_with_weights(name: str, dataset: str, norm: str) -> bool:
    """Whether robustbench's ``load_model`` reads no file of its folder: the model's own package fetches the weights."""
    known = f"{name.lower().replace('-', '_')}_{dataset}_{norm.replace('_3d', '')}".lower()
    return bool(import_timm().is_model(known)) or (dataset == "imagenet" and "Standard" in name)


def _known(name: str, names: Iterable[str], what: str) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(names)[:8])}, ..."
        raise ValueError(f"there is no {what} called {name!r}; {hint}")


def _filled(
    build: Callable[[int | None], nn.Module],
    word: str,
    wanted: Wanted,
    cached: Path,
    *,
    fetch: Callable[[], Path],
    adapt: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda tensors, model: tensors,
) -> Built:
    """A model with the wanted weights, and what is to be said of them."""
    with same_random():
        model = build(wanted.classes)
    if wanted.random:
        return Built(model, None, {"weights": RANDOM})
    file = wanted.file or cached
    if wanted.file is None and not cached.is_file():
        try:
            file = fetch()
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise ValueError(_not_to_be_had(word, [cached], reason_of(error))) from error
    held = read_weights(file)
    tensors = adapt(held.tensors, model)
    if wanted.file is not None and (classes := other_classes(model, tensors)) is not None:
        with same_random():
            model = build(classes)
    notes = load_weights(model, tensors, source=str(file))
    return Built(model, None, held.about, (*held.notes, *notes))


def _not_to_be_had(word: str, files: list[Path], reason: str) -> str:
    names = ", ".join(file.name for file in files)
    return (
        f"the weights of {word} are not here and can't be fetched ({reason}); put {names} into "
        f"{files[0].parent}, or name a file with weights=FILE, or take random ones with random_weights=True"
    )


def _timm_filter(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring a file of a model's first authors to timm's names, as timm does."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None or set(tensors) == set(model.state_dict()):
        return tensors
    adapted: dict[str, Tensor] = adapt(tensors, model)
    return adapted


def _as_torch_file(file: Path, place: Path) -> None:
    """Put a weights file where robustbench looks for it, in the format that it reads."""
    if file.suffix == ".safetensors":
        torch.save(read_weights(file).tensors, place)
    elif not file.is_file():
        raise ValueError(f"there is no weights file {file}")
    else:
        read_plain(file)
        os.symlink(file.resolve(), place)


def _classes(classes: int | None) -> dict[str, int]:
    return {} if classes is None else {"num_classes": classes}


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _download(url: str, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(url, str(place), progress=False)
    return place
