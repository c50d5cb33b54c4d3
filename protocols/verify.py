"""Verifying results: everything that can be checked without attacking anything again.

What can't: that a sample is *robust*. A replay proves that a broken sample is broken; that no attack breaks another can
only be believed, or attacked. Nor do hashes stop anybody who makes them anew after changing a file. So false claims of
breaking are found, and so are numbers that don't follow from the rows; breaks that were withheld throughout are not,
and the accuracies are upper bounds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.losses import margin
from msa_eval.data import Samples
from msa_eval.defense.contract import Defense, without_weight_gradients
from msa_eval.device import check_device
from msa_eval.evidence.archive import Archive
from msa_eval.evidence.folder import ARCHIVE, CROSSCHECK, GALLERY, TABLES
from msa_eval.evidence.proof import Proof
from msa_eval.evidence.provenance import defense_hash
from msa_eval.evidence.results import SCHEMA_VERSION, run_digest
from msa_eval.hashing import bytes_of, file_hash
from msa_eval.judging.batch_plan import batch_of, plan_batches, select
from msa_eval.judging.replay import Replay
from msa_eval.numerics import exact
from msa_eval.progress import Progress, silent
from msa_eval.protocols.recount import COLUMNS, Tables, check_columns, recount
from msa_eval.protocols.spec import Protocol, make_protocol
from msa_eval.targets.loading import resolve
from msa_eval.targets.pair import make_targets

NEAR_TIE = 1e-5
"""Where two logits are closer than this share of their size, another machine may round to the other verdict."""

NEAR = "near tie, not reproduced on this machine"
LEAST = "that a sample is robust can't be proven by replay: breaks that were withheld are not found"


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: of it.
        passed: whether it holds; ``None`` where it could not be checked.
        detail: what was found, in a sentence.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        checks: in the order they were made.
        claims: how many samples, over all targets and contexts, the results call broken.
        replayed: how many of these a stored batch breaks here.
        seconds: that it took.
    """

    checks: tuple[Check, ...]
    claims: int
    replayed: int
    seconds: float

    @property
    def unproven(self) -> int:
        """How many claims no stored batch proves."""
        return self.claims - self.replayed

    @property
    def passed(self) -> bool:
        """Whether everything was checked, and holds."""
        return all(check.passed for check in self.checks)

    @property
    def intact(self) -> bool:
        """Whether nothing was found to be wrong; something may not have been checked."""
        return all(check.passed is not False for check in self.checks)


@exact()
def verify(
    folder: str | Path,
    target: object,
    x: Samples | Tensor | Any,
    y: Tensor | Any = None,
    *,
    fc: object = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Verification:
    """Check results against themselves, and against the target and the data they are said to be about.

    Hashes, protocol, weights, data and batch plan are compared; clean predictions are made again; every stored batch
    is held to the ball and the box of the protocol and decided by the hard target, in float32, as a real batch; every
    sample called broken must be broken by one; and all numbers are counted again from the rows.

    That a sample is robust can't be proven by replay: false claims of breaking are found, withheld breaks are not.

    Args:
        folder: the results.
        target: the defence, as for `msa_eval.evaluate`.
        x: `Samples`, or images ``(N, C, H, W)``: the whole data set that was given to `msa_eval.evaluate`.
        y: labels ``(N,)``, unless ``x`` is `Samples`.
        fc: the plain classifier, if it was given to `msa_eval.evaluate`; by default the defence's own, if the results
            are of it too, and ``False`` for none.
        device: where to compute; modules are moved there.
        progress: shows how far the replay has come.

    Raises:
        ValueError: when there are no results, or the target can't be evaluated at all.
    """
    started = time.perf_counter()
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no complete results: there is no run.json")
    samples = Samples.of(x, y)
    device = check_device(device)
    only = _named_targets(folder / "run.json")
    targets = make_targets(resolve(target, samples)[0], fc, samples, device, only=only)
    case = _Case(folder, targets, samples, device, progress)
    # The verdicts are float32, whatever surrounds the call.
    with (
        torch.inference_mode(False), torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False),
        without_weight_gradients(*targets.values()),
    ):  # fmt: skip
        case.check()
    seconds = time.perf_counter() - started
    return Verification(tuple(case.checks), len(case.claims), len(case.proven), round(seconds, 3))


@dataclass(frozen=True)
class Reopened:
    """Results beside what they are about.

    Attributes:
        protocol: that they were made under.
        samples: their rows of samples.csv.
        seats: the plan: indices into the data set, a tensor a batch.
        targets: by name, on the device.
        data: the whole data set, with what was evaluated decoded.
    """

    protocol: Protocol
    samples: pd.DataFrame
    seats: Sequence[Tensor]
    targets: Mapping[str, Defense]
    data: Samples


def reopen(folder: str | Path, target: object, samples: Samples, *, fc: object = None, device: str = "cpu") -> Reopened:
    """Put results beside their target and their data again, for more to be done with them.

    Args:
        folder: the results.
        target: the defence, as for `msa_eval.evaluate`.
        samples: the whole data set that was evaluated.
        fc: the plain classifier, if it was given to `msa_eval.evaluate`; only those that the results are of are kept.
        device: where to compute; modules are moved there.

    Raises:
        ValueError: when there are no results, they were changed, or are of another target, data set or plan.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no complete results: there is no run.json")
    _, stated = _read_run(folder / "run.json")
    with contextlib.suppress(_NotCheckedError):
        _check_hashes(folder, stated.run)
    _, tables = _read_tables(folder)
    _, protocol = _read_protocol(stated)
    made = make_targets(resolve(target, samples)[0], fc, samples, device, only=stated.targets)
    targets = {name: one for name, one in made.items() if name in stated.targets}
    _check_weights(stated, targets)
    samples = samples.decoded(_planned(protocol, samples)[0])
    _check_data(stated, samples)
    _, seats = _check_batches(tables, protocol, stated, samples)
    _check_samples(tables, seats, samples)
    return Reopened(protocol, tables.samples, seats, targets, samples)


def _named_targets(path: Path) -> Collection[str] | None:
    """The targets that run.json names; ``None`` where it can't be read, which a check of its own says."""
    try:
        return _read_run(path)[1].targets
    except ValueError:
        return None


@dataclass(frozen=True)
class _Stated:
    """What run.json says, as far as it is checked."""

    run: Mapping[str, Any]
    protocol: str
    protocol_sha256: str
    overrides: Mapping[str, Any]
    modified: bool
    data_sha256: str
    n: int
    plan_sha256: str
    targets: Mapping[str, str]
    archive: Mapping[str, Any] | None
    draws: Mapping[str, int]

    @classmethod
    def read(cls, run: Mapping[str, Any]) -> _Stated:
        """Take it apart.

        Raises:
            ValueError: when something is missing or of another type.
        """
        targets = _field(run, "targets", dict)
        return cls(
            run=run,
            protocol=_field(run, "protocol.text", str),
            protocol_sha256=_field(run, "protocol.sha256", str),
            overrides=_field(run, "protocol.overrides", dict),
            modified=_field(run, "protocol.modified", bool),
            data_sha256=_field(run, "data.sha256", str),
            n=_field(run, "data.n", int),
            plan_sha256=_field(run, "batches.sha256", str),
            targets={name: _field(about, "sha256", str, f"targets.{name}.") for name, about in targets.items()},
            archive=_field(run, "adversarial", dict) if run.get("adversarial") is not None else None,
            draws={name: _field(run["draws"], name, int, "draws.") for name in run.get("draws", {})},
        )


def _field(run: Any, name: str, kind: type, prefix: str = "") -> Any:
    value = run
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"run.json has no valid {prefix}{name}")
    return value


Claim = tuple[str, str, int]
"""Target, context and index of a sample that the results call broken."""


class _NotCheckedError(Exception):
    """A check that can't be made; says why."""


@dataclass
class _Case:
    """A verification under way: a step adds a check, and what needs a step that failed is not made."""

    folder: Path
    targets: Mapping[str, Defense]
    samples: Samples
    device: str
    progress: Progress
    checks: list[Check] = field(default_factory=list)
    claims: set[Claim] = field(default_factory=set)
    proven: set[Claim] = field(default_factory=set)

    def check(self) -> None:
        """Make all checks."""
        stated = self._step("run.json", lambda: _read_run(self.folder / "run.json"))
        if stated is None:
            return
        self._step("hashes", lambda: _check_hashes(self.folder, stated.run))
        tables = self._step("tables", lambda: _read_tables(self.folder))
        protocol = self._step("protocol", lambda: _read_protocol(stated))
        weights = self._step("weights", lambda: _check_weights(stated, self.targets))
        with contextlib.suppress(ValueError):  # which the steps below meet again
            if protocol is not None:
                self.samples = self.samples.decoded(_planned(protocol, self.samples)[0], progress=self.progress)
        data = self._step("data", lambda: _check_data(stated, self.samples))
        if tables is not None:
            self.claims = _claims(tables.samples)
        if tables is None or protocol is None:
            self._skip(
                "there are no tables or no protocol", "numbers", "batches", "samples", "trunk", "clean", "replay"
            )
            return
        self._step("numbers", lambda: _check_numbers(tables, protocol, stated))
        if data is None:
            self._skip("these are not the data", "batches", "samples", "trunk", "clean", "replay")
            return
        seats = self._step("batches", lambda: _check_batches(tables, protocol, stated, self.samples))
        if seats is None:
            self._skip("the batches are not the protocol's", "samples", "trunk", "clean", "replay")
            return
        self._step("samples", lambda: _check_samples(tables, seats, self.samples))
        if weights is None:
            self._skip("these are not the weights", "trunk", "clean", "replay")
            return
        replays = self._step("trunk", lambda: self._prepared(seats, stated))
        if replays is None:
            self._skip("features do not come from their own image alone", "clean", "replay")
            return
        self._step("clean", lambda: _check_clean(tables, replays))
        self._replay(stated, _Referee(replays, protocol))

    def _step(self, name: str, make: Callable[[], tuple[str, Any]]) -> Any:
        """Make a check that says what it found and hands something on; ``None`` where it does not pass."""
        try:
            detail, value = make()
        except (ValueError, _NotCheckedError) as error:
            failed = isinstance(error, ValueError)
            self.checks.append(Check(name, False if failed else None, " ".join(str(error).split())))
            return None
        self.checks.append(Check(name, True, detail))
        return value

    def _skip(self, reason: str, *names: str) -> None:
        self.checks += [Check(name, None, f"not checked, because {reason}") for name in names]

    def _prepared(self, seats: Sequence[Tensor], stated: _Stated) -> tuple[str, dict[str, Replay]]:
        replays = {
            name: Replay(target, self.samples, seats, device=self.device, draws=stated.draws.get(name, 1))
            for name, target in self.targets.items()
        }
        return "features come from their own image alone, so that rows can be exchanged", replays

    def _replay(self, stated: _Stated, referee: _Referee) -> None:
        """Replay the archive: one check of the file, one of its points, one of what they break."""
        if stated.archive is not None or (self.folder / ARCHIVE).exists():
            archive = self._step("archive", lambda: _open_archive(self.folder, stated, referee))
            if archive is not None:
                self._step("points", lambda: self._judge(archive, referee))
        self.proven = referee.proven & self.claims
        self._step("replay", lambda: self._tally(stated, referee))

    def _judge(self, archive: Archive, referee: _Referee) -> tuple[str, None]:
        faults = [fault for proof in self.progress(archive, "replay") for fault in referee.judge(proof)]
        _none_of(faults)
        ball = referee.protocol.ball
        return f"{len(archive)} proofs: all points in the {ball.norm} ball of radius {ball.eps:.6g} and in [0, 1]", None

    def _tally(self, stated: _Stated, referee: _Referee) -> tuple[str, None]:
        """Hold what was broken here against what the results call broken."""
        found = f"replayed {len(self.proven)} of {len(self.claims)} claims"
        if stated.archive is None and self.claims:
            raise _NotCheckedError(f"{found}: the run was made without save_adversarial=True")
        reasons = [
            f"sample {index} ({target}, {context}): {referee.reason(target, context, index)}"
            for target, context, index in sorted(self.claims - self.proven)
        ]
        reasons += [
            f"sample {index} ({target}, {context}): a stored batch breaks it, but samples.csv does not say so"
            for target, context, index in sorted(referee.proven - self.claims)
        ]
        if reasons:
            raise ValueError(f"{found}{_short(stated)}; {_first(reasons)}")
        return found, None


@dataclass
class _Referee:
    """What the real targets answer to stored batches.

    Attributes:
        replays: the targets by name.
        protocol: whose ball and contexts count.
        proven: the samples that a batch was seen to break.
        held: for the others, why a batch that was meant to break them did not.
    """

    replays: Mapping[str, Replay]
    protocol: Protocol
    proven: set[Claim] = field(default_factory=set)
    held: dict[Claim, str] = field(default_factory=dict)

    def images(self, number: int) -> Tensor:
        """The clean batch of a number."""
        return next(iter(self.replays.values())).images(number)

    def judge(self, proof: Proof) -> Iterator[str]:
        """Decide a stored proof and enter what it breaks; a sentence for each fault of its points."""
        where = f"{proof.target}, {proof.context}, batch {proof.batch}"
        replay = self.replays.get(proof.target)
        if replay is None or proof.context not in self.protocol.contexts:
            yield f"{where}: neither such a target nor such a context was evaluated"
            return
        if proof.kind != "rows" and proof.context != "joint" and replay.batch_dependent:
            yield f"{where}: more than one image of a batch was moved, which the context does not allow"
            return
        outside = self._outside(proof, replay)
        if outside > 0:
            yield f"{where}: a point lies {outside:.3g} outside the ball or the [0, 1] box"
            return
        try:
            logits = replay.logits(proof)
        except ValueError as error:
            yield f"{where}: {error}"
            return
        self._enter(proof, replay, logits)

    def reason(self, target: str, context: str, index: int) -> str:
        """Why a sample that is called broken counts as unproven."""
        return self.held.get((target, context, index), "no valid stored batch is about it")

    def _outside(self, proof: Proof, replay: Replay) -> float:
        clean = replay.images(proof.batch).cpu()
        own = clean[proof.positions]
        excess = [self.protocol.ball.excess(proof.x, own if proof.kind == "rows" else clean)]
        if proof.own is not None:
            excess.append(self.protocol.ball.excess(proof.own, own))
        return float(torch.cat(excess).max())

    def _enter(self, proof: Proof, replay: Replay, logits: Tensor) -> None:
        """Note what was broken; a target that ignores companions is broken in every context at once."""
        y = replay.labels(proof)
        wrong = (logits.argmax(dim=1) != y) & torch.isfinite(logits).all(dim=1)
        close = _near_tie(logits, y)
        contexts = (proof.context,) if replay.batch_dependent else self.protocol.contexts
        samples = replay.batches[proof.batch][proof.positions].tolist()
        for index, broken, tie in zip(samples, wrong.tolist(), close.tolist(), strict=True):
            for context in contexts:
                if broken:
                    self.proven.add((proof.target, context, index))
                else:
                    self.held[proof.target, context, index] = NEAR if tie else "its stored batch does not break it"


def _near_tie(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the verdict on each row ``(B, k)`` hangs on rounding ``(B,)``."""
    return margin(logits, y).abs() < NEAR_TIE * logits.abs().amax(dim=1)


def _short(stated: _Stated) -> str:
    """What the archive is known to lack, as run.json tells it."""
    about = stated.archive or {}
    left_out, unconfirmed = about.get("left_out"), about.get("unconfirmed")
    if not left_out and not unconfirmed:
        return ""
    count = len(unconfirmed) if isinstance(unconfirmed, list) else unconfirmed
    return f" (the run left out {left_out!r:.20} for the archive's size, and could not confirm {count!r:.20} itself)"


def _first(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


def _none_of(faults: Sequence[str]) -> None:
    """Raise a `ValueError` with the first of the faults, if there are any."""
    if faults:
        raise ValueError(_first(faults))


def _claims(samples: pd.DataFrame) -> set[Claim]:
    broken = samples[samples["clean_correct"] & ~samples["robust"]]
    return {
        (str(t), str(c), int(i)) for t, c, i in zip(broken["target"], broken["context"], broken["index"], strict=True)
    }


def _read_run(path: Path) -> tuple[str, _Stated]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run.json is not readable: {error}") from error
    if not isinstance(run, dict):
        raise ValueError("run.json is not the run.json of an evaluation")
    if run.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"run.json has schema version {run.get('schema_version')!r:.20}, but this release reads {SCHEMA_VERSION}"
        )
    return f"readable, of schema version {SCHEMA_VERSION}", _Stated.read(run)


def _check_hashes(folder: Path, run: Mapping[str, Any]) -> tuple[str, None]:
    """Hold every table, the gallery, and run.json itself, against the hashes recorded.

    A gallery proves nothing, so one that was left out is no fault.
    """
    if "files" not in run and "sha256" not in run:
        raise _NotCheckedError("run.json carries no hashes: it is from before they were recorded, or they were removed")
    faults = []
    if run.get("sha256") != run_digest(run):
        faults.append("run.json was tampered with: it does not match its own hash")
    recorded = run.get("files")
    files = recorded if isinstance(recorded, dict) else {}
    paths = [*(path for path in folder.glob("*.csv") if path.name != CROSSCHECK), *folder.glob(GALLERY)]
    held = {path.name: file_hash(path) for path in paths}
    left_out = {GALLERY} & set(files) - set(held)
    due = {*held, *files, *(f"{name}.csv" for name in TABLES)} - left_out
    for name in sorted(due):
        if name not in held or files.get(name) != held[name]:
            faults.append(f"{name} was tampered with: it does not match the hash in run.json")
    _none_of(faults)
    missing = f"; {GALLERY} is missing and was not checked" if left_out else ""
    return f"{len(due)} files and run.json match the hashes recorded{missing}", None


def _read_tables(folder: Path) -> tuple[str, Tables]:
    tables = {}
    for name in COLUMNS:
        path = folder / f"{name}.csv"
        try:
            # At once, or a column's type would be guessed piece by piece.
            tables[name] = pd.read_csv(path, low_memory=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name} is not readable: {error}") from error
        check_columns(name, tables[name])
    return f"{len(tables['samples'])} samples, {len(tables['outcomes'])} outcomes", Tables(**tables)


def _read_protocol(stated: _Stated) -> tuple[str, Protocol]:
    try:
        protocol = make_protocol(tomllib.loads(stated.protocol), source="the protocol in run.json")
    except RecursionError as error:
        raise ValueError("the protocol in run.json is not readable") from error
    if protocol.digest() != stated.protocol_sha256:
        raise ValueError("the protocol's text in run.json was tampered with: it does not match the protocol's hash")
    changed = dict(stated.overrides)
    if stated.modified != bool(changed) or any(protocol.values.get(key) != value for key, value in changed.items()):
        raise ValueError("the overrides in run.json are not those of the protocol's text")
    return f"{protocol.name} v{protocol.version}, as hashed", protocol


def _check_weights(stated: _Stated, targets: Mapping[str, Defense]) -> tuple[str, bool]:
    if set(stated.targets) != set(targets):
        raise ValueError(
            f"the results are of {' and '.join(sorted(stated.targets))}, "
            f"but what is given makes {' and '.join(sorted(targets))}"
        )
    for name, expected in stated.targets.items():
        found = defense_hash(targets[name])
        if found != expected:
            raise ValueError(
                f"the {name} has other weights ({found[:12]}) than the one the results are of ({expected[:12]})"
            )
    return f"of {' and '.join(stated.targets)}, as hashed", True


def _check_data(stated: _Stated, samples: Samples) -> tuple[str, bool]:
    found = samples.digest()
    if found != stated.data_sha256:
        raise ValueError(
            f"{samples.name} ({found[:12]}) is not the data the results are about ({stated.data_sha256[:12]})"
        )
    return f"{len(samples)} images and labels, as hashed", True


def _check_numbers(tables: Tables, protocol: Protocol, stated: _Stated) -> tuple[str, None]:
    _none_of(recount(tables, targets=list(stated.targets), contexts=protocol.contexts, eps=protocol.ball.eps))
    if bool(tables.attacks["final"].isna().any()) and stated.run.get("verdict") != "incomplete":
        raise ValueError("attacks.csv holds runs that failed, but run.json does not call the results incomplete")
    return "summary.csv, attacks.csv and samples.csv follow from outcomes.csv, and the order of the numbers holds", None


def _planned(protocol: Protocol, samples: Samples) -> tuple[Tensor, list[Tensor]]:
    """The samples that a protocol evaluates, and the places in these of every batch."""
    chosen = select(samples.y, protocol)
    plan = plan_batches(len(chosen), size=protocol.batch_size, seed=protocol.batches_seed)
    if protocol.apgd is not None and protocol.apgd.victim is not None:
        chosen, plan = batch_of(protocol.apgd.victim, chosen, plan)
    return chosen, plan


def _check_batches(tables: Tables, protocol: Protocol, stated: _Stated, samples: Samples) -> tuple[str, list[Tensor]]:
    """Make the plan again; hand on indices into the data set, a tensor a batch."""
    chosen, plan = _planned(protocol, samples)
    seats = [chosen[places] for places in plan]
    expected = [(number, at, index) for number, seat in enumerate(seats) for at, index in enumerate(seat.tolist())]
    found = tables.batches[["batch", "position", "index"]].to_numpy().tolist()
    if [tuple(row) for row in found] != expected:
        raise ValueError("batches.csv is not the plan that the protocol makes")
    digest = hashlib.sha256(b"".join(bytes_of(seat) + b"|" for seat in seats)).hexdigest()
    if digest != stated.plan_sha256 or stated.n != len(chosen):
        raise ValueError("run.json states another batch plan than the protocol makes")
    return f"{len(chosen)} samples in {len(seats)} batches, as the protocol plans them", seats


def _check_samples(tables: Tables, seats: Sequence[Tensor], samples: Samples) -> tuple[str, None]:
    """Hold every row of samples.csv against the data and the plan."""
    seated = {
        int(index): (int(samples.y[index]), number, at)
        for number, seat in enumerate(seats)
        for at, index in enumerate(seat.tolist())
    }
    faults = []
    for (target, context), rows in tables.samples.groupby(["target", "context"]):
        index = rows["index"].tolist()
        if index != sorted(seated):
            faults.append(f"samples.csv ({target}, {context}) is not about the samples of the plan, in their order")
            continue
        held = zip(index, rows[["label", "batch", "position"]].to_numpy().tolist(), strict=True)
        faults += [
            f"samples.csv: sample {i} ({target}, {context}) has label, batch and position {tuple(row)}, not {seated[i]}"
            for i, row in held
            if tuple(row) != seated[i]
        ]
    _none_of(faults)
    return "labels and places are those of the data and the plan", None


def _check_clean(tables: Tables, replays: Mapping[str, Replay]) -> tuple[str, None]:
    """Make the clean predictions again."""
    faults = []
    count = 0
    at_random: set[str] = set()
    for (target, context), rows in tables.samples.groupby(["target", "context"]):
        if target not in replays:
            continue
        if replays[str(target)].draws > 1:
            at_random.add(str(target))
            continue
        stated = dict(zip(rows["index"].tolist(), rows["clean_prediction"].tolist(), strict=True))
        for index, found, close in _clean_predictions(replays[str(target)], str(context)):
            count += 1
            if stated.get(index) != found:
                reason = NEAR if close else f"but is {found} here"
                faults.append(f"sample {index} ({target}, {context}): clean_prediction {stated.get(index)}, {reason}")
    _none_of(faults)
    chance = "".join(f"; {target} answers at random, so its own were not compared" for target in sorted(at_random))
    return f"{count} clean predictions made again{chance}", None


def _clean_predictions(replay: Replay, context: str) -> Iterator[tuple[int, int, bool]]:
    """Each sample's index, its prediction, and whether that hangs on rounding."""
    for number, seat in enumerate(replay.batches):
        logits = replay.clean_logits(number, context)
        found = logits.argmax(dim=1)
        top = logits.topk(2, dim=1).values
        close = top[:, 0] - top[:, 1] < NEAR_TIE * logits.abs().amax(dim=1)
        yield from zip(seat.tolist(), found.tolist(), close.tolist(), strict=True)


def _open_archive(folder: Path, stated: _Stated, referee: _Referee) -> tuple[str, Archive]:
    path = folder / ARCHIVE
    if stated.archive is None:
        raise ValueError(f"run.json does not know of {ARCHIVE}: it is not of this run, or its entry was removed")
    if stated.archive.get("file") != ARCHIVE or not path.is_file():
        raise ValueError(f"{ARCHIVE}, which run.json names, is not there")
    if file_hash(path) != stated.archive.get("sha256"):
        raise ValueError(f"{ARCHIVE} was tampered with: it does not match the hash in run.json")
    archive = Archive(path, referee.images, referee.protocol.ball)
    return f"{len(archive)} proofs in {path.stat().st_size} bytes, as hashed", archive
