"""The ablation of HPM: variants fine-tuned from one start and evaluated under one protocol.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, section 4.4.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from msa_eval._version import __version__
from msa_eval.data import Samples
from msa_eval.defense.architectures import Classifier
from msa_eval.device import device_for
from msa_eval.engine.evaluate import evaluate
from msa_eval.evidence.provenance import environment
from msa_eval.evidence.results import INCOMPLETE, WITHOUT_AUDIT, Results
from msa_eval.files import write_whole
from msa_eval.hashing import bytes_of, weights_hash
from msa_eval.hpm.finetune import FinetuneSettings, finetune, history
from msa_eval.hpm.model import HPM, Variant
from msa_eval.progress import Notify, Progress, silent, warn
from msa_eval.protocols.loading import load_protocol
from msa_eval.protocols.schema import Protocol
from msa_eval.targets.checkpoint import Checkpoint, save_checkpoint
from msa_eval.targets.target import Target
from msa_eval.targets.weights import misfits, read_safetensors
from msa_eval.untrusted import printable

FULL = "full"
VARIANTS: Mapping[str, Variant] = {
    FULL: Variant(),
    "no-global": Variant(prototypes="batch"),
    "average": Variant(mixer="average"),
    "inner": Variant(similarity="inner"),
    "plain-l2": Variant(prototypes="global"),
    "plain-cosine": Variant(prototypes="global", similarity="cosine"),
}
"""The paper's components CEst, PMixer and DistDeci, each switched alone, and two heads of class means without any
of HPM: DeepNCM's and DNC's with one centroid a class, on features that stay as they are. These two learn nothing but
class means (see `msa_eval.hpm.finetune.finetune`)."""

TABLE, ABOUT = "ablation.csv", "ablation.json"


@dataclass(frozen=True)
class Ablation:
    """What an ablation found.

    Attributes:
        table: one row per variant, context and number, with its Wilson interval, its ``difference`` to ``full`` and the
            verdict on it; the variant ``fc`` is the classifier that all were built on.
        about: the settings that all have in common, and each variant's switches, weights and times.
    """

    table: pd.DataFrame
    about: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Ablation:
        """Read what `ablate` wrote; of one that was stopped, what it had finished.

        Raises:
            ValueError: when the folder holds no ablation.
        """
        folder = Path(folder)
        about = _read(folder / ABOUT)
        if about is None or not (folder / TABLE).is_file():
            raise ValueError(f"{folder} holds no ablation: there is no {TABLE} with {ABOUT} beside it")
        table = pd.read_csv(folder / TABLE)
        if "reasons" in table:  # a sound verdict has none, which reads as a missing number
            table["reasons"] = table["reasons"].astype("string").fillna("").astype(object)
        return cls(table, about)


def ablate(
    start: Checkpoint | Target | Classifier | HPM,
    train: Samples,
    test: Samples,
    *,
    protocol: str | Path | Protocol = "msa",
    overrides: Mapping[str, Any] | None = None,
    settings: FinetuneSettings | None = None,
    variants: Mapping[str, Variant] = VARIANTS,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    notify: Notify = warn,
) -> Ablation:
    """Fine-tune variants of HPM from one classifier with the same data and settings, and evaluate each.

    Samples, batches, seed and protocol are the same for all, so that differences are paired. ``full`` is always among
    them, and the classifier is evaluated beside it.

    Args:
        start: the classifier; of an HPM defence, the one it was built on, as it was before fine-tuning.
        train: what the variants are fine-tuned on.
        test: what they are evaluated on.
        protocol: the name of a shipped one, a TOML file, or a `Protocol`.
        overrides: values to put in place of the protocol's, by dotted key.
        settings: of the fine-tuning; by default those that an HPM checkpoint was made with, or else the paper's for
            CIFAR-10.
        variants: by name.
        seed: of the attacks.
        device: where to compute, as for `msa_eval.evaluate`.
        out: a folder for the table, each variant's evidence and, where ``start`` is a `Checkpoint`, its checkpoint. An
            ablation that was stopped there goes on after the last variant it finished.
        force: replace what was made there with other settings.
        progress: shows how far each loop has come.
        notify: as for `msa_eval.evaluate`.

    Raises:
        ValueError: when classifier, data and protocol don't fit together, or ``out`` holds something else.
        AttackError: when an attack or a variant fails on a batch.
        OSError: when the results can't be written.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, overrides=overrides)
    elif overrides:
        raise ValueError("give overrides with a protocol's name or file, not with a Protocol")
    classifier = (
        start.fc_target if isinstance(start, HPM) else start if isinstance(start, Classifier) else start.classifier
    )
    settings, device = settings or settings_of(start), device_for(device, notify)
    variants = {FULL: VARIANTS[FULL], **variants}
    _check(classifier, train, test, variants)
    common = {
        "classifier": {"sha256": weights_hash(classifier), "logits_sha256": _answers(classifier, test)},
        "train": {"name": train.name, "sha256": train.digest(), "n": len(train)},
        "test": {"name": test.name, "sha256": test.digest()},
        "finetune": asdict(settings),
        "protocol": {
            "name": protocol.name,
            "version": protocol.version,
            "overrides": dict(protocol.overrides),
            "sha256": protocol.digest(),
            "text": protocol.text(),
        },
        "seed": seed,
        "msa_eval": __version__,
    }
    origin = {"target": dict(start.about)} if isinstance(start, Target) else {}
    record = _Record.open(None if out is None else Path(out), common, variants, origin, force=force)
    found: dict[str, Results] = {}
    for name, variant in variants.items():
        shown = _named(progress, name)
        done = record.results(name)
        if done is None:
            model = record.model(name, classifier)
            if model is None:
                began = time.perf_counter()
                model = finetune(classifier, train, settings=settings, variant=variant, device=device, progress=shown)
                record.keep(name, model, start, origin | history(settings, train), seconds=time.perf_counter() - began)
            done = evaluate(
                _of(start, name, model), test, protocol=protocol, fc=None if name == FULL else False, seed=seed,
                device=device, out=record.folder and record.folder / name, force=force, progress=shown,
                notify=notify,
            )  # fmt: skip
            record.close(name, done, environment(device))
        found[name] = done
        record.write(_table(found))
    return Ablation(_table(found), record.about)


def settings_of(start: Checkpoint | Target | Classifier | HPM) -> FinetuneSettings:
    """The settings an HPM checkpoint was fine-tuned with, or the paper's for CIFAR-10.

    Raises:
        ValueError: when a checkpoint's notes on them can't be read.
    """
    notes = {} if isinstance(start, Classifier | HPM) else start.history.get("finetune", {})
    try:
        return FinetuneSettings(**notes)
    except TypeError as error:
        raise ValueError(f"the checkpoint's notes on its fine-tuning can't be used ({error}); give settings") from error


@torch.no_grad()
def _answers(classifier: Classifier, test: Samples) -> str:
    """SHA-256 of a few logits: normalisation and the user's code are no weights, but these depend on them.

    Raises:
        ValueError: when the classifier can't take the images.
    """
    x = test.images(torch.arange(min(8, len(test)))).to(classifier.fc.weight.device)
    try:
        logits = classifier.eval()(x)
    except RuntimeError as error:
        shape = tuple(x.shape[1:])
        raise ValueError(f"the classifier can't take images of shape {shape}: {printable(error)}") from error
    return hashlib.sha256(bytes_of(logits.float())).hexdigest()


def _of(start: object, name: str, model: HPM) -> HPM | Target:
    """A variant of a target by name says so in its evidence."""
    if not isinstance(start, Target):
        return model
    about: dict[str, Any] = {"word": f"{name} of {start.word}", "kind": "variant", "target": dict(start.about)}
    about |= {"random_weights": True} if start.about.get("random_weights") else {}
    return Target(model, str(about["word"]), about)


def _check(classifier: Classifier, train: Samples, test: Samples, variants: Mapping[str, Variant]) -> None:
    """Notice before any work what would only show after the first fine-tuning."""
    if variants[FULL] != VARIANTS[FULL]:
        raise ValueError(f"the variant {FULL!r} is the paper's defence; give yours another name")
    if wrong := [name for name in variants if name in ("", "fc") or Path(name).name != name]:
        raise ValueError(f"{wrong[0]!r} can't be the name of a variant; choose a plain word")
    shapes = [samples.shape for samples in (train, test)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"expected images of one shape, but {train.name} has {shapes[0]} and {test.name} has {shapes[1]}"
        )
    if int(test.y.max()) >= (classes := classifier.fc.out_features):
        raise ValueError(
            f"expected labels below {classes}, the classifier's number of classes, "
            f"but {test.name} has label {int(test.y.max())}"
        )


def _named(progress: Progress, name: str) -> Progress:
    def shown(iterable: Iterable[Any], description: str) -> Iterable[Any]:
        return progress(iterable, f"{name}: {description}")

    return shown


def _table(found: Mapping[str, Results]) -> pd.DataFrame:
    """The numbers of all variants and of the classifier, and their differences to the full defence."""
    keys = ["context", "metric"]
    summary = found[FULL].summary
    parts = [summary[summary["target"] == "fc"].assign(variant="fc")]
    parts += [r.summary[r.summary["target"] == "defense"].assign(variant=name) for name, r in found.items()]
    table = pd.concat(parts, ignore_index=True).fillna(WITHOUT_AUDIT)
    full = summary[summary["target"] == "defense"].set_index(keys)["value"]
    there = pd.MultiIndex.from_frame(table[keys])
    table["difference"] = table["value"].to_numpy() - full.loc[there].to_numpy()
    columns = ["variant", *keys, "value", "low", "high", "n", "difference"]
    return table[columns + [name for name in ("verdict", "reasons") if name in table]]


class _Record:
    """An ablation on disk: what all variants have in common, and which are done; nothing at all without a folder.

    ``ablation.json`` is written before the first variant and after each step, so that one stopped in between leaves
    whole what is finished.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about

    @classmethod
    def open(
        cls,
        folder: Path | None,
        common: dict[str, Any],
        variants: Mapping[str, Variant],
        origin: Mapping[str, Any],
        *,
        force: bool,
    ) -> _Record:
        """Begin, or go on where the folder holds an ablation with the same settings, ``origin`` aside.

        Raises:
            ValueError: when it holds one with others, and ``force`` is not given, or can't be written.
        """
        wanted = {name: asdict(variant) for name, variant in variants.items()}
        about: dict[str, Any] = {"schema_version": 1, **origin, **common, "variants": {}}
        if folder is not None:
            earlier = _read(folder / ABOUT)
            other = _changes(earlier, common, wanted) if earlier else []
            if other and not force:
                raise ValueError(
                    f"{folder} holds an ablation with other settings ({'; '.join(other)}); choose another folder, or "
                    f"replace it with force=True"
                )
            if earlier and not other:
                about = earlier
        for name, switches in wanted.items():
            about["variants"].setdefault(name, {"switches": switches})
        record = cls(folder, about)
        try:
            record.write()
        except OSError as error:
            raise ValueError(f"{folder} can't be written: {error.strerror}; choose another folder") from error
        return record

    def results(self, name: str) -> Results | None:
        """The evidence of a variant that is done, if it is of these settings.

        Raises:
            ValueError: when the folder holds evidence that is not what was noted of it.
        """
        noted = self.about["variants"][name]
        incomplete = noted.get("verdict", INCOMPLETE) == INCOMPLETE  # what failed is tried again
        if self.folder is None or incomplete or not (self.folder / name / "run.json").is_file():
            return None
        results = Results.load(self.folder / name)
        run = results.run
        have = (run["key"], run["protocol"]["sha256"], run["seed"], run["data"]["sha256"],
                run["targets"]["defense"]["sha256"])  # fmt: skip
        want = (noted["key"], self.about["protocol"]["sha256"], self.about["seed"], self.about["test"]["sha256"],
                noted["sha256"])  # fmt: skip
        text = (self.folder / name / "summary.csv").read_bytes()
        if have != want or hashlib.sha256(text).hexdigest() != run["files"]["summary.csv"]:
            raise ValueError(
                f"{self.folder / name} does not hold the results that {ABOUT} notes; remove it to make them anew"
            )
        return results

    def model(self, name: str, classifier: Classifier) -> HPM | None:
        """The variant fine-tuned earlier, if its checkpoint is there and holds the weights noted.

        The file gives tensors alone: the user's own code need not be found again.
        """
        path = self._checkpoint(name)
        noted = self.about["variants"][name]
        if path is None or "sha256" not in noted or not path.is_file():
            return None
        momentum, variant = self.about["finetune"]["momentum"], Variant(**noted["switches"])
        model = HPM(copy.deepcopy(classifier.trunk), classifier.fc, momentum=momentum, variant=variant)
        _, tensors = read_safetensors(path)
        if misfits(model, tensors):
            return None
        model.load_state_dict(tensors)
        model.eval().requires_grad_(False)
        return model if weights_hash(model) == noted["sha256"] else None

    def keep(self, name: str, model: HPM, start: object, notes: Mapping[str, Any], *, seconds: float) -> None:
        """Note a variant's weights, and save its checkpoint where its architecture is known."""
        self.about["variants"][name] |= {"sha256": weights_hash(model), "seconds_finetune": round(seconds, 1)}
        path = self._checkpoint(name)
        if path is not None and isinstance(start, Checkpoint | Target) and start.blueprint is not None:
            notes = {"classifier_sha256": self.about["classifier"]["sha256"], **notes}
            save_checkpoint(path, model, start.blueprint, history=notes)
        self.write()

    def close(self, name: str, results: Results, surroundings: Mapping[str, Any]) -> None:
        """Note that a variant is done, and by what."""
        run = results.run
        self.about["variants"][name] |= {"key": run["key"], "verdict": run["verdict"], "seconds": run["seconds"]}
        self.about |= {"n": run["data"]["n"], **surroundings}

    def _checkpoint(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def write(self, table: pd.DataFrame | None = None) -> None:
        """Write the record, and before it the table so far."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if table is not None:
            write_whole(self.folder / TABLE, table.to_csv(index=False, lineterminator="\n").encode())
        write_whole(self.folder / ABOUT, _json(self.about).encode())


def _changes(
    earlier: Mapping[str, Any], common: Mapping[str, Any], wanted: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """In what an earlier ablation differs, in words."""
    found = []
    for name, value in common.items():
        old = earlier.get(name)
        if old != json.loads(_json(value)):
            short = f" {old}, now {value}" if not isinstance(value, Mapping) else ""
            found.append(f"{name}{short}")
    noted = earlier.get("variants", {})
    return found + [
        f"variant {name}"
        for name, switches in wanted.items()
        if noted.get(name, {}).get("switches", switches) != switches
    ]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable: {error}; choose another folder, or remove it") from error
    if not isinstance(about, dict) or not isinstance(about.get("variants"), dict):
        raise ValueError(f"{path} is not the record of an ablation; choose another folder, or remove it")
    return about


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
