"""Options that several commands share, and how they are read."""

from __future__ import annotations

import functools
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msa_eval.cli.messages import as_options
from msa_eval.quantity import as_number

if TYPE_CHECKING:
    import pandas as pd

    from msa_eval.data import Samples, Split
    from msa_eval.engine.executors import Executor
    from msa_eval.targets.checkpoint import Checkpoint
    from msa_eval.targets.target import Target

NOT_SOUND, INCOMPLETE = 3, 4
"""Exit status of ``--strict`` where the verdict is anything but sound; and, always, where something failed."""


class _Number(click.ParamType[float]):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read ``0.03`` or ``8/255``."""
        try:
            return as_number(value)
        except ValueError:
            self.fail(f"{value!r} is not a number or a fraction such as 8/255", param, ctx)


class _Assignment(click.ParamType[tuple[str, Any]]):
    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Read ``attack.square.queries=1000``: the value is TOML, or else a text."""
        if isinstance(value, tuple):
            return value
        key, separator, text = str(value).partition("=")
        if not separator or not key.strip():
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        try:
            return key.strip(), tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return key.strip(), text.strip()


NUMBER = _Number()
ASSIGNMENT = _Assignment()

protocol = click.option(
    "--protocol",
    default="msa",
    show_default=True,
    help="A shipped protocol (see 'msa-eval protocols') or a .toml file.",
)
out = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
limit = click.option("--limit", type=click.IntRange(min=1), help="Evaluate at most this many samples, drawn uniformly.")
context = click.option(
    "--context",
    multiple=True,
    help="What the attacker controls: joint, solo, alone or composed; may be repeated.",
)


def assignments(command: Callable[..., None]) -> Callable[..., None]:
    """The options --set, --eps and --norm, as one parameter ``assignments``."""

    @functools.wraps(command)
    def gathered(assignments: tuple[tuple[str, Any], ...], eps: str | None, norm: str | None, **given: Any) -> None:
        threat = {"threat.eps": eps, "threat.norm": norm}
        command(assignments=(*assignments, *((k, v) for k, v in threat.items() if v is not None)), **given)

    for option in (
        click.option("--norm", help="Norm of the perturbations: Linf, L2 or L1."),
        click.option("--eps", help="Radius of the perturbations in [0, 1] pixel units, such as 8/255."),
        click.option(
            "--set", "assignments", type=ASSIGNMENT, multiple=True, metavar="KEY=VALUE", help="Set any protocol key."
        ),
    ):
        gathered = option(gathered)
    return gathered


def device(command: Callable[..., None]) -> Callable[..., None]:
    """The option --device; an accelerator that was found, not named, is reported in one line."""

    @functools.wraps(command)
    def gathered(device: str, **given: Any) -> None:
        if device == "auto":
            from msa_eval.device import automatic_device

            device = "cpu" if given.get("engine") == "ray" else automatic_device()
            if device != "cpu" and not given.get("quiet"):
                click.echo(f"note: computing on {device} (--device changes it)", err=True)
        command(device=device, **given)

    return click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or mps; auto: the first there is."
    )(gathered)


precision = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of forward passes during the search; auto benchmarks both. Verdicts always use float32.",
)
deterministic = click.option("--deterministic", is_flag=True, help="Use deterministic algorithms only, also on GPUs.")
force = click.option("--force", is_flag=True, help="Replace other results in the output folder.")
anew = click.option("--force", is_flag=True, help="Start anew; existing results are kept under a dated name.")
quiet = click.option("--quiet", is_flag=True, help="Show no progress.")
found_surrogates = click.option(
    "--no-found-surrogates",
    is_flag=True,
    help="Do not search the target's own code for surrogates when its gradients are misleading.",
)
seed = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of all randomness."
)


@dataclass(frozen=True)
class Chosen:
    """The target that a command was given, and how it is to be loaded."""

    word: str
    how: Mapping[str, Any]

    def load(self, samples: Samples, *, quiet: bool = False) -> Target:
        """Load it, and say on stderr what its user should know."""
        from msa_eval.targets.loading import load_target

        loaded = load_target(self.word, samples, **self.how)
        for note in () if quiet else loaded.notes:
            click.echo(f"note: {as_options(note)}", err=True)
        return loaded


def target(command: Callable[..., None], *, required: bool = True) -> Callable[..., None]:
    """The argument TARGET and the options that say how it is loaded, as one parameter ``target``."""

    @functools.wraps(command)
    def gathered(target: str | None, **given: Any) -> None:
        how = {name: given.pop(name) for name in LOADING}
        command(target=Chosen(target or "", how), **given)

    for option in reversed([click.argument("target", required=required), *LOADING.values()]):
        gathered = option(gathered)
    return gathered


optional_target = functools.partial(target, required=False)
"""The same where TARGET may be left out; its word is then empty."""


@dataclass(frozen=True)
class Data:
    """The data that a command was given, and how it is to be read."""

    source: str
    how: Mapping[str, Any] = field(default_factory=dict)

    def load(self, *, split: Split = "test", quiet: bool = False) -> Samples:
        """Load it, and say on stderr what its user should know."""
        return self.like(self.source, split=split, quiet=quiet)

    def like(self, source: str, *, split: Split, quiet: bool = False) -> Samples:
        """Load other data in the same way."""
        from msa_eval.data import load_samples

        loaded = load_samples(source, split=split, **self.how)
        for note in () if quiet else loaded.notes:
            click.echo(f"note: {note}", err=True)
        return loaded


READING = {
    "root": click.option(
        "--data-root", "root", default="data", show_default=True,
        help="Folder of torchvision's data sets (cifar10, cifar100).",
    ),
    "classes": click.option(
        "--classes", type=click.Path(path_type=Path),
        help="For a folder: file with the model's classes in its order, one per line.",
    ),
    "resize": click.option(
        "--resize", type=click.IntRange(min=1), help="For a folder: resize the shorter side to this many pixels."
    ),
    "crop": click.option(
        "--crop", type=click.IntRange(min=1), help="For a folder: crop this many pixels from the centre."
    ),
}  # fmt: skip
"""How data is read; the names are those of `load_samples`."""

_DATA = "digits, cifar10, cifar100, an .npz or .pt file with x and y, or a folder of class folders."


def data(*, required: bool = True, help: str = _DATA) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option --data and those that say how it is read, as one parameter ``data``; its source may be empty."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathered(data: str | None, **given: Any) -> None:
            how = {name: given.pop(name) for name in READING}
            command(data=Data(data or "", how), **given)

        for option in reversed([click.option("--data", required=required, help=help), *READING.values()]):
            gathered = option(gathered)
        return gathered

    return decorated


def imports_code(word: str) -> bool:
    """Whether loading a target would import code of the user's own."""
    from msa_eval.targets.zoos import ZOOS

    return ":" in word and word.partition(":")[0] not in ZOOS


def _channels(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> tuple[float, ...] | str | None:
    """Read ``0.5,0.5,0.5``, or ``0.5`` once a channel, or ``none``."""
    parts = [part.strip() for text in value for part in text.split(",")]
    if parts == ["none"]:
        return "none"
    try:
        return tuple(as_number(part) for part in parts) or None
    except ValueError as error:
        raise click.BadParameter(f"{error}; give one per channel, or none", ctx, param) from error


LOADING = {
    "weights": click.option(
        "--weights", type=click.Path(path_type=Path), help="Weights for TARGET: safetensors, or a plain state dict."
    ),
    "random_weights": click.option(
        "--random-weights", is_flag=True,
        help="Use randomly initialised weights; the results are marked accordingly.",
    ),
    "head": click.option("--head", help="Name of the layer that computes the logits, if it is not found."),
    "whole": click.option("--whole", is_flag=True, help="Do not split TARGET into trunk and head."),
    "models": click.option(
        "--models", default="models", show_default=True, help="Folder of robustbench's weights.",
        type=click.Path(path_type=Path),
    ),
    "trunk": click.option("--trunk", help="Your own code that the checkpoint was made from; it is imported."),
    "mean": click.option(
        "--mean", multiple=True, callback=_channels, metavar="M,M,M",
        help="Mean of the normalisation in front of TARGET (torchvision, timm, a bare state dict); none: without.",
    ),
    "std": click.option(
        "--std", multiple=True, callback=_channels, metavar="S,S,S",
        help="Standard deviation of that normalisation.",
    ),
}  # fmt: skip


_ENGINE = {
    "engine": click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
        help="Where runs are executed: in this process or on a Ray cluster.",
    ),
    "address": click.option(
        "--address", metavar="ADDRESS", help="Address of the Ray cluster: auto (the default) or HOST:PORT."
    ),
    "cpus": click.option(
        "--cpus-per-worker", "cpus", type=click.IntRange(min=1),
        help="CPUs of each Ray worker and threads of each pass; default: torch's number of threads here.",
    ),
    "gpus": click.option("--gpus-per-worker", "gpus", type=click.FloatRange(min=0), help="GPUs of each Ray worker."),
}  # fmt: skip


def engine(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where runs are made, as one parameter ``engine``."""

    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        named = {name: given.pop(name) for name in _ENGINE}
        command(engine=_engine(**named), **given)

    for option in reversed(_ENGINE.values()):
        gathered = option(gathered)
    return gathered


def _engine(engine: str, address: str | None, cpus: int | None, gpus: float | None) -> Executor | None:
    """The engine that was asked for; ``None`` is this process.

    Raises:
        ValueError: when a cluster is described that is not used.
    """
    if engine == "ray":
        from msa_eval.engine.ray_executor import RayEngine

        return RayEngine(address or "auto", cpus=cpus, gpus=gpus or 0)
    if address is not None or cpus is not None or gpus is not None:
        raise ValueError("--address, --cpus-per-worker and --gpus-per-worker describe a Ray cluster; give --engine ray")
    return None


_BARE = (
    click.option("--architecture", help="Architecture of a bare state dict: wideresnet or digits-cnn."),
    click.option(
        "--argument",
        "arguments",
        type=ASSIGNMENT,
        multiple=True,
        metavar="KEY=VALUE",
        help="Argument of the architecture.",
    ),
)


def bare(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe a bare state dict, for `load_classifier`."""
    for option in reversed(_BARE):
        command = option(command)
    return command


def load_classifier(
    target: Chosen,
    samples: Samples,
    *,
    architecture: str | None,
    arguments: Sequence[tuple[str, Any]],
    quiet: bool = False,
) -> Checkpoint | Target:
    """Load a target, or a bare state dict where an architecture is given.

    Raises:
        ValueError: when it can't be read, or could not be read again from a checkpoint, or is described though it
            describes itself.
    """
    from msa_eval.targets.checkpoint import load_bare_classifier

    if architecture is None:
        if arguments:
            raise ValueError("--argument describes a bare state dict; give --architecture with it")
        loaded = target.load(samples, quiet=quiet)
        loaded.check_rebuilt()
        return loaded
    for option in ("weights", "random_weights", "whole", "trunk"):
        if target.how.get(option):
            raise ValueError(
                f"--{option.replace('_', '-')} does not go with --architecture, which describes a bare state dict"
            )
    mean, std = (target.how.get(name) for name in ("mean", "std"))
    normalization = {"mean": list(mean or ()), "std": list(std or ())} if mean != "none" and (mean or std) else None
    head = target.how.get("head") or "fc"
    return load_bare_classifier(target.word, architecture, dict(arguments), normalization=normalization, head=head)


def overrides(assignments: Sequence[tuple[str, Any]], *, context: Sequence[str] = (), **given: Any) -> dict[str, Any]:
    """Protocol keys set by ``--set`` and by options of their own, where these were given."""
    keys = {"limit": "samples.limit", "batch_size": "batches.size", "victim": "attack.apgd.victim"}
    named = {keys[name]: value for name, value in given.items() if value is not None}
    return dict(assignments) | named | ({"threat.contexts": list(context)} if context else {})


def check_complete(table: pd.DataFrame, of: str) -> None:
    """End with status 4 where something failed; the table that was printed names each part.

    Args:
        table: of results, with a ``verdict`` a row where they have any.
        of: the column that says what a row stands for.
    """
    from msa_eval.evidence import results

    incomplete = list(table[table["verdict"] == results.INCOMPLETE][of].unique()) if "verdict" in table else []
    if incomplete:
        click.echo(
            f"Error: incomplete: parts of the evaluation of {', '.join(map(str, incomplete))} failed, which are named "
            f"above; the same command tries these again",
            err=True,
        )
        sys.exit(INCOMPLETE)


def drawn(samples: Samples, limit: int | None, *, seed: int) -> Samples:
    """So many samples at most, uniformly drawn."""
    if limit is None or limit >= len(samples):
        return samples
    import torch

    index = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:limit]
    return samples.only(index, f"{limit} of {samples.name}")
