"""Verifying results: everything that can be checked without attacking anything again.

What can't: that a sample is *robust*. A replay proves that a broken sample is broken; that no attack breaks another can
only be believed, or attacked. Nor do hashes stop anybody who makes them anew after changing a file. So false claims of
breaking are found, and so are numbers that don't follow from the rows; breaks that were withheld throughout are not,
and the accuracies are upper bounds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.data import Samples
from msa_eval.defense.contract import Defense
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.device import device_for
from msa_eval.evidence.archive import Archive
from msa_eval.evidence.folder import ARCHIVE, POINTS
from msa_eval.evidence.results import load_run
from msa_eval.judging.replay import Replay
from msa_eval.numerics import full_precision
from msa_eval.progress import Progress, silent, warn
from msa_eval.targets.loading import resolve
from msa_eval.targets.pair import make_targets
from msa_eval.verification.best_points import check_points
from msa_eval.verification.checks import (
    NotCheckedError,
    check_batches,
    check_clean,
    check_data,
    check_hashes,
    check_numbers,
    check_samples,
    check_weights,
    first_of,
    none_of,
    open_archive,
    planned,
    read_protocol,
    read_run,
    read_tables,
)
from msa_eval.verification.referee import Claim, Referee

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


@full_precision()
def verify(
    folder: str | Path,
    target: object,
    x: Samples | Tensor | Any,
    y: Tensor | Any = None,
    *,
    fc: object = None,
    device: str = "auto",
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
        device: where to compute; modules are moved there. ``auto`` is CUDA, else MPS, else the CPU.
        progress: shows how far the replay has come.

    Raises:
        ValueError: when there are no results, or the target can't be evaluated at all.
    """
    started = time.perf_counter()
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no complete results: there is no run.json")
    samples = Samples.of(x, y)
    device = device_for(device, warn)
    only = _named_targets(folder)
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


def _named_targets(folder: Path) -> Collection[str] | None:
    """The targets that run.json names; ``None`` where it can't be read, which a check of its own says."""
    try:
        return set(load_run(folder)["targets"])
    except ValueError:
        return None


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
        run = self._step("run.json", lambda: read_run(self.folder))
        if run is None:
            return
        self._step("hashes", lambda: check_hashes(self.folder, run))
        tables = self._step("tables", lambda: read_tables(self.folder))
        protocol = self._step("protocol", lambda: read_protocol(run))
        weights = self._step("weights", lambda: check_weights(run, self.targets))
        with contextlib.suppress(ValueError):  # which the steps below meet again
            if protocol is not None:
                chosen = planned(protocol, self.samples)[0]
                held = self.samples.decoded(chosen, progress=self.progress)
                self.samples = held.leveled(protocol.ball.levels, chosen)
        data = self._step("data", lambda: check_data(run, self.samples))
        if tables is not None:
            self.claims = _claims(tables.samples)
        if tables is None or protocol is None:
            self._skip(
                "there are no tables or no protocol", "numbers", "batches", "samples", "trunk", "clean", "replay"
            )
            return
        self._step("numbers", lambda: check_numbers(tables, protocol, run))
        if data is None:
            self._skip("these are not the data", "batches", "samples", "trunk", "clean", "replay")
            return
        batch_plan = self._step("batches", lambda: check_batches(tables, protocol, run, self.samples))
        if batch_plan is None:
            self._skip("the batches are not the protocol's", "samples", "trunk", "clean", "replay")
            return
        self._step("samples", lambda: check_samples(tables, batch_plan, self.samples))
        if weights is None:
            self._skip("these are not the weights", "trunk", "clean", "replay")
            return
        replays = self._step("trunk", lambda: self._prepared(batch_plan, run, protocol.ball))
        if replays is None:
            self._skip("features do not come from their own image alone", "clean", "replay")
            return
        self._step("clean", lambda: check_clean(tables, replays))
        referee = Referee(replays, protocol)
        self._replay(run, referee)
        if run.get("points") is not None or (self.folder / POINTS).exists():
            self._step("best points", lambda: check_points(self.folder, run, referee, tables.samples))

    def _step(self, name: str, make: Callable[[], tuple[str, Any]]) -> Any:
        """Make a check that says what it found and hands something on; ``None`` where it does not pass."""
        try:
            detail, value = make()
        except (ValueError, NotCheckedError) as error:
            failed = isinstance(error, ValueError)
            self.checks.append(Check(name, False if failed else None, " ".join(str(error).split())))
            return None
        self.checks.append(Check(name, True, detail))
        return value

    def _skip(self, reason: str, *names: str) -> None:
        self.checks += [Check(name, None, f"not checked, because {reason}") for name in names]

    def _prepared(
        self, batch_plan: Sequence[Tensor], run: Mapping[str, Any], ball: Ball
    ) -> tuple[str, dict[str, Replay]]:
        replays = {
            name: Replay(
                target, self.samples, batch_plan, device=self.device, draws=run.get("draws", {}).get(name, 1), ball=ball
            )
            for name, target in self.targets.items()
        }
        return "features come from their own image alone, so that rows can be exchanged", replays

    def _replay(self, run: Mapping[str, Any], referee: Referee) -> None:
        """Replay the archive: one check of the file, one of its points, one of what they break."""
        if run.get("adversarial") is not None or (self.folder / ARCHIVE).exists():
            archive = self._step("archive", lambda: open_archive(self.folder, run, referee))
            if archive is not None:
                self._step("points", lambda: self._judge(archive, referee))
        self.proven = referee.proven & self.claims
        self._step("replay", lambda: self._tally(run, referee))

    def _judge(self, archive: Archive, referee: Referee) -> tuple[str, None]:
        faults = [fault for proof in self.progress(archive, "replay") for fault in referee.judge(proof)]
        none_of(faults)
        ball = referee.protocol.ball
        grid = "" if ball.levels is None else f", and on the grid of {ball.levels} levels"
        found = (
            f"{len(archive)} proofs: all points in the {ball.norm} ball of radius {ball.eps:.6g} and in [0, 1]{grid}"
        )
        return found, None

    def _tally(self, run: Mapping[str, Any], referee: Referee) -> tuple[str, None]:
        """Hold what was broken here against what the results call broken."""
        found = f"replayed {len(self.proven)} of {len(self.claims)} claims"
        if run.get("adversarial") is None and self.claims:
            raise NotCheckedError(f"{found}: the run was made without save_adversarial=True")
        reasons = [
            f"sample {index} ({target}, {context}): {referee.reason(target, context, index)}"
            for target, context, index in sorted(self.claims - self.proven)
        ]
        reasons += [
            f"sample {index} ({target}, {context}): a stored batch breaks it, but samples.csv does not say so"
            for target, context, index in sorted(referee.proven - self.claims)
        ]
        if reasons:
            raise ValueError(f"{found}{_short(run)}; {first_of(reasons)}")
        return found, None


def _short(run: Mapping[str, Any]) -> str:
    """What the archive is known to lack, as run.json tells it."""
    about = run.get("adversarial") or {}
    left_out, unconfirmed = about.get("left_out"), about.get("unconfirmed")
    if not left_out and not unconfirmed:
        return ""
    count = len(unconfirmed) if isinstance(unconfirmed, list) else unconfirmed
    return f" (the run left out {left_out!r:.20} for the archive's size, and could not confirm {count!r:.20} itself)"


def _claims(samples: pd.DataFrame) -> set[Claim]:
    broken = samples[samples["clean_correct"] & ~samples["robust"]]
    return {
        (str(t), str(c), int(i)) for t, c, i in zip(broken["target"], broken["context"], broken["index"], strict=True)
    }
