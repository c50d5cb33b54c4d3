"""The cross-check: do third-party attacks break what our results call robust, on the same target and batches?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.external.attack import ExternalAttack
from msa_eval.attacks.external.faults import Fault, describe_faults
from msa_eval.attacks.external.libraries import LIBRARIES, find, installed
from msa_eval.data import Samples
from msa_eval.defense.contexts import CONTEXTS
from msa_eval.defense.contract import Defense, own_surrogates
from msa_eval.defense.weight_gradients import without_weight_gradients
from msa_eval.device import device_for
from msa_eval.engine.external_runs import external_runs
from msa_eval.engine.schedule import Run
from msa_eval.judging.batch_history import BatchHistory
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.replay import Replay
from msa_eval.numerics import full_precision
from msa_eval.progress import Progress, silent, ticking, warn
from msa_eval.protocols.checks import ExternalSpec
from msa_eval.randomness import seeded
from msa_eval.verification.reopen import Reopened, reopen

SURROGATES = ("fc-oracle", "ste")
"""What a peer with gradients is run on by default: the FC head, and the target's own gradient."""

STEPS, QUERIES = 40, 500
"""Of a run by default, where an attack takes a number of steps or of queries."""

TURNS = 50
"""At most so many runs of one attack, where a run makes next to no passes."""

DEFAULT: Mapping[str, Sequence[str]] = {
    "Linf": (
        "autoattack:apgd-ce", "autoattack:apgd-t", "autoattack:fab-t", "autoattack:square",
        "torchattacks:PGD", "torchattacks:Jitter", "foolbox:LinfPGD", "foolbox:LInfFMNAttack",
    ),
    "L2": (
        "autoattack:apgd-ce", "autoattack:apgd-t", "autoattack:fab-t", "autoattack:square",
        "torchattacks:PGDL2", "foolbox:L2PGD", "foolbox:L2FMNAttack",
    ),
    "L1": (
        "autoattack:apgd-ce", "autoattack:apgd-t", "autoattack:fab-t", "autoattack:square", "foolbox:L1FMNAttack",
    ),
}  # fmt: skip
"""The peers run by default, by norm, where their library is installed."""


@dataclass(frozen=True)
class Crosscheck:
    """What peers broke of what results call robust.

    Attributes:
        table: one row per target, context, peer and surrogate: ``samples`` called robust, ``broken`` among them,
            ``unconfirmed`` (broken, but not when replayed), ``passes`` a sample, ``runs``, ``seconds``, ``which``
            (indices), ``notes`` (what the peer did and should not have) and ``error`` (why it failed).
        found: one row per sample that a peer broke: ``target``, ``context``, ``index``, ``label``, ``peer``,
            ``surrogate``.
        left_out: default peers whose library is not installed.
    """

    table: pd.DataFrame
    found: pd.DataFrame
    left_out: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether every peer came to its end and none broke anything."""
        return self.found.empty and not self.table["error"].astype(bool).any()


def default_attacks(ball: Ball) -> tuple[list[str], list[str]]:
    """The default peers that are installed, and those that are not."""
    names = DEFAULT[ball.norm]
    here = [name for name in names if installed(name.partition(":")[0])]
    return here, [name for name in names if name not in here]


def budgeted(
    name: str, ball: Ball, *, surrogates: Sequence[str] = (), steps: int = STEPS, queries: int = QUERIES
) -> ExternalSpec:
    """A peer with a budget, by whatever name it has one.

    Raises:
        ValueError: when there is no such peer, or its library is not installed.
    """
    peer = find(name, ball)
    options = {key: steps for key in ("steps",) if key in peer.options}
    options |= {key: queries for key in ("queries", "n_queries", "repeats") if key in peer.options}
    return ExternalSpec(
        name, () if peer.gradient_free and not surrogates else tuple(surrogates) or SURROGATES, 1, options
    )


@full_precision()
def crosscheck(
    folder: str | Path,
    target: object,
    x: Samples | Tensor | Any,
    y: Tensor | Any = None,
    *,
    fc: object = None,
    peers: Sequence[str] | None = None,
    surrogates: Sequence[str] = (),
    contexts: Sequence[str] = (),
    targets: Sequence[str] = (),
    steps: int = STEPS,
    passes: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> Crosscheck:
    """Run third-party attacks on the samples that results call robust.

    They meet the same target in the same batches and the same ball. Every batch that a peer shows inside the ball, and
    the points it returns, are judged by the hard target in float32, and what they break is replayed by the target alone
    before it counts. In ``composed`` peers choose no company: each image is attacked among its own companions. A target
    that ignores companions is attacked in one context, for all are the same to it.

    Args:
        folder: the results.
        target: the defence, as for `msa_eval.evaluate`.
        x: `Samples`, or images ``(N, C, H, W)``: the whole data set that was evaluated.
        y: labels ``(N,)``, unless ``x`` is `Samples`.
        fc: the plain classifier, if it was given to `msa_eval.evaluate`.
        peers: names, ``library:attack``; by default `DEFAULT`, as far as installed.
        surrogates: what they are run on, among them those that the defence brings; by default `SURROGATES`, or the
            hard target for one without gradients.
        contexts: some of the results'; by default all but ``composed``.
        targets: some of the results'; by default all.
        steps: of a run.
        passes: each attack is run again, from other starts, until it has made so many forward passes per sample;
            by default once. It is also the number of queries of one that has any.
        seed: of all that peers draw.
        device: where to compute; modules are moved there. ``auto`` is CUDA, else MPS, else the CPU.
        progress: shows how far it has come.

    Raises:
        ValueError: when the results can't be put beside target and data, or something named is not there.
    """
    samples = Samples.of(x, y)
    device = device_for(device, warn)
    # Verdicts are float32 and searches need gradients, whatever surrounds the call.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        opened = reopen(folder, target, samples, fc=fc, device=device)
        samples, ball = opened.data, opened.protocol.ball
        names, left_out = default_attacks(ball) if not peers else (list(dict.fromkeys(peers)), [])
        if not names:
            raise ValueError("no library of peers is installed here; " + "; ".join(c for _, c in LIBRARIES.values()))
        specs = [
            budgeted(name, ball, surrogates=surrogates, steps=steps, queries=passes or QUERIES) for name in names
        ]  # fmt: skip
        among = _chosen(contexts, opened.protocol.contexts, "context") or [
            context for context in opened.protocol.contexts if not CONTEXTS[context].chooses_companions
        ]
        on = _chosen(targets, list(opened.targets), "target") or list(opened.targets)
        rows: list[_Row] = []
        with without_weight_gradients(*opened.targets.values()):
            for name in on:
                rows += _Bout.of(name, opened, samples, device, seed, passes or 0).rows(specs, among, progress)
    table = pd.DataFrame([row._asdict() for row in rows]).drop(columns="labels")
    table["which"] = [" ".join(map(str, row.which)) for row in rows]
    found = [
        {"target": row.target, "context": row.context, "index": index, "label": row.labels[index],
         "peer": row.peer, "surrogate": row.surrogate}
        for row in rows for index in row.which
    ]  # fmt: skip
    columns = ["target", "context", "index", "label", "peer", "surrogate"]
    return Crosscheck(table, pd.DataFrame(found, columns=columns), left_out)


def _chosen(wanted: Sequence[str], there: Iterable[str], what: str) -> list[str]:
    have = list(there)
    if missing := [name for name in wanted if name not in have]:
        raise ValueError(f"the results have no {what} {missing[0]!r}; they have {', '.join(have)}")
    return [name for name in have if name in wanted]


class _Row(NamedTuple):
    """A row of the table; ``labels`` are of the samples broken."""

    target: str
    context: str
    peer: str
    surrogate: str
    samples: int
    broken: int
    unconfirmed: int
    passes: float
    runs: int
    seconds: float
    which: list[int]
    notes: str
    error: str
    labels: Mapping[int, int]


@dataclass(frozen=True)
class _Bout:
    """One target against all peers.

    Attributes:
        name: ``defense`` or ``fc``.
        defense: the target.
        clean: its clean batches.
        replay: the target as it answers for proofs.
        opened: the results.
        seed: of what peers draw.
        passes: a sample, until which a peer is run again.
    """

    name: str
    defense: Defense
    clean: CleanBatches
    replay: Replay
    opened: Reopened
    seed: int
    passes: int

    @classmethod
    def of(cls, name: str, opened: Reopened, samples: Samples, device: str, seed: int, passes: int) -> _Bout:
        """Make the clean batches of the plan again."""
        defense = opened.targets[name]
        chosen = torch.cat(list(opened.batch_plan)).sort().values
        places = [torch.searchsorted(chosen, indices) for indices in opened.batch_plan]
        clean = CleanBatches(
            defense, samples, chosen, places, device=device, stochastic=opened.protocol.stochastic,
            ball=opened.protocol.ball,
        )  # fmt: skip
        replay = Replay(
            defense, samples, opened.batch_plan, device=device, draws=clean.draws, batch_dependent=clean.batch_dependent
        )
        return cls(name, defense, clean, replay, opened, seed, passes)

    def rows(self, specs: Sequence[ExternalSpec], contexts: Sequence[str], progress: Progress) -> list[_Row]:
        """Run every peer through each of its surrogates in each context."""
        contexts = contexts if self.clean.batch_dependent else contexts[:1]
        with seeded(self.seed):
            runs = external_runs(
                specs, self.opened.protocol.ball, self.defense, next(iter(self.clean)),
                num_classes=self.clean.num_classes,
                own=own_surrogates(self.opened.targets.get("defense")), use_own=self.name == "defense",
            )  # fmt: skip
        made = []
        for context in contexts:
            clean = self.clean.seen_in(context)
            with ticking(progress, len(runs) * len(clean), f"{self.name} {context}") as tick:
                for run in runs:
                    made.append(self._row(run, context, clean, tick))
        return made

    def _row(self, run: Run, context: str, clean: CleanBatches, tick: Any) -> _Row:
        rows = self.opened.samples
        rows = rows[(rows["target"] == self.name) & (rows["context"] == context)]
        robust = set(rows.loc[rows["robust"], "index"])
        started, images, runs, searched = time.perf_counter(), 0, 0, 0
        which: list[int] = []
        unconfirmed: set[int] = set()
        faults: list[Fault] = []
        error = ""
        try:
            for batch in clean:
                tick()
                indices = self.opened.batch_plan[batch.number]
                counted = torch.tensor([index in robust for index in indices.tolist()], device=batch.y.device)
                if not bool(counted.any()):
                    continue
                met = self._meet(run, context, batch, counted & batch.correct)
                which += indices[met.broken.cpu()].tolist()
                unconfirmed |= set(indices[met.unconfirmed.cpu()].tolist())
                faults += met.faults
                images, runs = images + met.images, runs + met.runs
                searched += len(indices) if self._together(context) else int(counted.sum())
        except Exception as failure:
            error = " ".join(str(failure).split()) or type(failure).__name__
        assert isinstance(run.attack, ExternalAttack)
        labels = {index: int(self.clean.samples.y[index]) for index in which}
        return _Row(
            self.name, context, run.attack.library_attack.name, run.surrogate_name, len(robust), len(which),
            len(unconfirmed - set(which)), round(images / max(searched, 1), 1), runs,
            round(time.perf_counter() - started, 1), sorted(which), "; ".join(describe_faults(faults)), error, labels,
        )  # fmt: skip

    def _together(self, context: str) -> bool:
        """Whether the images of a batch are decided, and so moved, as one."""
        return self.clean.batch_dependent and not CONTEXTS[context].one_batch_per_sample

    def _meet(self, run: Run, context: str, batch: Batch, counted: Tensor) -> _Met:
        """Run a peer on one batch until it has made its passes."""
        attack = run.attack
        assert isinstance(attack, ExternalAttack)
        view = self.clean.view(context, batch)
        together = self._together(context)
        met = _Met(torch.zeros_like(counted), torch.zeros_like(counted), [], 0, 0)
        for turn in range(TURNS if attack.library_attack.starts else 1):
            left = counted & ~met.broken
            size = len(counted) if together else int(counted.sum())
            if not bool(left.any()) or (turn and met.images >= self.passes * size):
                break
            again = dataclasses.replace(run, attack=dataclasses.replace(attack, turn=turn), restart=turn)
            generator = again.generator(self.seed, "crosscheck", self.name, context, batch.number)
            setting = dataclasses.replace(
                again.setting(view, BatchHistory(batch)), counted=left, draws=self.clean.draws, eot=1, keep=together
            )
            judged = JudgedBatch(
                view, run.surrogate, batch, self.opened.protocol.ball, mixes_rows=self.clean.batch_dependent,
                setting=setting,
            )  # fmt: skip
            assert again.attack is not None
            with seeded(generator.initial_seed()):
                outcome = judged.finish(again.attack(judged, generator))
                claimed = outcome.any_broken & left
                history = BatchHistory(batch)
                history.add(dataclasses.replace(outcome, any_broken=claimed))
                proven = self._proven(history, context, batch)
            met = _Met(
                met.broken | (claimed & proven), met.unconfirmed | (claimed & ~proven),
                [*met.faults, *outcome.faults], met.images + outcome.forwards, met.runs + 1,
            )  # fmt: skip
        return met

    def _proven(self, history: BatchHistory, context: str, batch: Batch) -> Tensor:
        """Which of the samples that a history calls broken a replay breaks ``(B,)``."""
        proven = torch.zeros_like(history.broken)
        own = self.opened.batch_plan[batch.number]
        proofs = history.proofs(
            self.name, context, batch.number, rows_interact=self.clean.batch_dependent, pool=own
        )  # fmt: skip
        for proof in proofs:
            breaks = self.replay.breaks if self.clean.draws == 1 else self.replay.clearly_breaks
            proven[proof.positions[breaks(proof).cpu()].to(proven.device)] = True
        return proven


class _Met(NamedTuple):
    """What one peer did to one batch; masks are ``(B,)``."""

    broken: Tensor
    unconfirmed: Tensor
    faults: list[Fault]
    images: int
    runs: int
