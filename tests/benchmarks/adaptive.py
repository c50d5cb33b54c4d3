"""An attack written for HPM alone, against the samples that results call robust.

    python -m tests.benchmarks adaptive results/digits digits --context composed --passes 740 --seed 0

It shares no search with the engine: steps with momentum through one of four gradients of HPM's decision, from the image
or at random, towards one of the likeliest classes. In ``composed`` each try begins among the images whose FC softmax
says most, or least, of the label and of the class aimed at, and at some steps all such companies are tried again, and
then swaps of one image. Which of these it does is drawn anew for every try and sample, so a run with another seed is
another attack. In ``joint`` the whole batch moves against one survivor after another, from where its lead was lowest or
anew, and a pass of the batch is one of each survivor's. A break counts when HPM itself, asked about the whole batch, is
wrong.
"""

from __future__ import annotations

import argparse
import itertools
import time
import tomllib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from msa_eval import HPM, Results, Samples, load_checkpoint, load_samples
from msa_eval.attacks.ball import Ball
from msa_eval.protocols.schema import CompositionBudget
from msa_eval.references import reference_path

from .subjects import cifar10

STEPS, SWAPS, RANKS = 30, 150, 6
ROUTES = (
    {"assignment": "frozen"}, {"assignment": "ste"}, {"assignment": "soft", "temperature": 0.3}, {"assignment": "soft"},
)  # fmt: skip
SIGNS = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)))


class Adaptive:
    """One context's survivors in batches of one size, attacked side by side.

    Args:
        hpm: the target.
        data: all images.
        ball: the perturbation set.
        rows: of ``samples.csv``: the survivors.
        own: each one's companions, as indices into the data ``(n, B - 1)``; none in ``alone``.
        pool: images to choose company from, where the attacker chooses.
        seed: of all that is drawn.
    """

    def __init__(
        self, hpm: HPM, data: Samples, ball: Ball, rows: pd.DataFrame, own: Tensor, pool: Tensor | None, seed: int
    ) -> None:
        self.hpm, self.ball, self.own = hpm, ball, own
        self.index = torch.tensor(rows["index"].tolist())
        self.x, self.y = data.x[self.index], data.y[self.index]
        self.draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.z = torch.cat([hpm.features(part) for part in data.x.split(256)])
            self.says = hpm.fc_logits(self.z).softmax(dim=1)
            self.clean = self.decide(self.z[self.index], own)
        self.able: Tensor | None = None
        if pool is not None:
            able = torch.zeros(len(self.index), len(data), dtype=torch.bool)
            able[:, pool] = True
            self.able = able.scatter(1, own, True).scatter(1, self.index.unsqueeze(1), False)

    def decide(self, z: Tensor, company: Tensor, **route: object) -> Tensor:
        """Logits of each row in its own batch."""
        beside = self.z[company] if company.shape[1] else None
        logits: Tensor = self.hpm.logits_one_at_a_time(z, beside, **({"assignment": "ste"} | route))  # type: ignore[arg-type]
        return logits

    def lead(self, logits: Tensor, toward: Tensor | None) -> Tensor:
        """Of the label, over one class or over the likeliest other."""
        own = logits.gather(1, self.y.unsqueeze(1)).squeeze(1)
        if toward is not None:
            return own - logits.gather(1, toward.unsqueeze(1)).squeeze(1)
        return own - logits.scatter(1, self.y.unsqueeze(1), -torch.inf).amax(dim=1)

    def attempt(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One try: every point ``(n, C, H, W)`` and who sits beside it, each after a pass."""
        n, draw = len(self.y), self.draw
        others = self.clean.scatter(1, self.y.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
        toward = others.gather(1, torch.randint(min(RANKS, others.shape[1] - 1), (n, 1), generator=draw)).squeeze(1)
        route = ROUTES[int(torch.randint(len(ROUTES), (), generator=draw))]
        wide = bool(torch.rand((), generator=draw) < 0.3)  # whether steps count every class, not the one aimed at
        x = self.ball.random(self.x, draw) if torch.rand((), generator=draw) < 0.5 else self.x
        company = self.own
        if self.able is not None:
            company = self.gather(toward, SIGNS[torch.randint(len(SIGNS), (n,), generator=draw)])
        every = int(torch.tensor([5, 8, 12, 23, STEPS])[torch.randint(5, (), generator=draw)])
        momentum = torch.zeros_like(x)
        for step in range(STEPS + 1):
            x = x.detach().requires_grad_(step < STEPS)
            with torch.set_grad_enabled(step < STEPS):
                z = self.hpm.features(x)
                if self.able is not None and step and step % every == 0:
                    company = self.regroup(z.detach(), company, toward)
                if step < STEPS:
                    lead = self.lead(self.decide(z, company, **route), None if wide else toward)
            yield x.detach(), company
            if step == STEPS:
                return
            (slope,) = torch.autograd.grad(lead.sum(), x)
            momentum = 0.75 * momentum - self.ball.unit(slope)
            length = self.ball.eps * (1 - 0.98 * step / (STEPS - 1))
            x = self.ball.project(x.detach() + length * self.ball.ascent(momentum), self.x)
        raise AssertionError("the last step returns")

    def gather(self, toward: Tensor, signs: Tensor, noise: float = 0.2) -> Tensor:
        """The images that say most by a weighing ``(n, 2)`` of the label's softmax and the aimed-at class's."""
        assert self.able is not None
        says = self.says[:, self.y].T * signs[:, :1] + self.says[:, toward].T * signs[:, 1:]
        score = says + noise * torch.rand(says.shape, generator=self.draw)
        return score.masked_fill(~self.able, -torch.inf).topk(self.own.shape[1], dim=1).indices

    def regroup(self, z: Tensor, company: Tensor, toward: Tensor) -> Tensor:
        """Try all weighings, then swaps of one image at a time."""
        assert self.able is not None
        with torch.no_grad():
            best = self.lead(self.decide(z, company), toward)
            for sign in SIGNS:
                company, best = self.better(
                    z, company, best, self.gather(toward, sign.expand(len(z), 2)), toward
                )  # fmt: skip
            weights = self.able.float()
            drawn = torch.multinomial(weights, SWAPS, replacement=True, generator=self.draw)
            places = torch.randint(company.shape[1], (SWAPS,), generator=self.draw).tolist()
            for place, new in zip(places, drawn.T, strict=True):
                other = company.clone()
                other[:, place] = torch.where((company == new.unsqueeze(1)).any(dim=1), company[:, place], new)
                company, best = self.better(z, company, best, other, toward)
        return company

    def better(self, z: Tensor, company: Tensor, best: Tensor, other: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
        """Take another company where it leaves the label less."""
        lead = self.lead(self.decide(z, other), toward)
        return torch.where((lead < best).unsqueeze(1), other, company), torch.minimum(lead, best)

    def run(self, passes: int) -> dict[int, int]:
        """Indices of the samples broken, and after how many passes."""
        found: dict[int, int] = {}
        made = 0
        while made + STEPS + 1 <= passes:
            for x, company in self.attempt():
                made += 1
                with torch.no_grad():
                    z = self.hpm.features(x)  # the verdict's own pass is not counted
                    wrong = self.lead(self.decide(z, company), None) < 0
                    for i in wrong.nonzero().flatten().tolist():
                        index = int(self.index[i])
                        if index not in found and self.breaks(z[i : i + 1], company[i], i):
                            found[index] = made
        return found

    def breaks(self, z: Tensor, company: Tensor, i: int) -> bool:
        """Whether HPM itself is wrong about the first image of the whole batch."""
        logits = self.hpm.logits(torch.cat([z, self.z[company]]))
        return int(logits[0].argmax()) != int(self.y[i])


def together(hpm: HPM, x: Tensor, y: Tensor, left: list[int], ball: Ball, passes: int, seed: int) -> dict[int, int]:
    """Move a whole batch ``(B, C, H, W)`` against its survivors; the places of those broken, and after what passes."""
    draw, found, made = torch.Generator().manual_seed(seed), {}, 0
    best = dict.fromkeys(left, (torch.inf, x))

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=draw))

    for turn in itertools.count():
        standing = [row for row in left if row not in found]
        if not standing or made + STEPS + 1 > passes:
            return found
        victim = standing[turn % len(standing)]
        label, route, anew = int(y[victim]), ROUTES[pick(len(ROUTES))], pick(2) == 0
        point = ball.random(x, draw) if anew else best[victim][1]
        rank, momentum = pick(3), torch.zeros_like(x)
        for step in range(STEPS + 1):
            point = point.detach().requires_grad_(step < STEPS)
            with torch.set_grad_enabled(step < STEPS):
                z = hpm.features(point)
                logits = hpm.logits(z, **route)  # type: ignore[arg-type]
            made += 1
            with torch.no_grad():
                hard = hpm.logits(z)
                others = hard.scatter(1, y.unsqueeze(1), -torch.inf)
                leads = hard.gather(1, y.unsqueeze(1)).squeeze(1) - others.amax(dim=1)
            for row in standing:
                best[row] = min(best[row], (float(leads[row]), point.detach()), key=lambda held: held[0])
                if leads[row] < 0:
                    found.setdefault(row, made)
            if step == STEPS or victim in found:
                break
            if step % 10 == 0:
                toward = int(others[victim].argsort(descending=True)[rank if step == 0 else 0])
            (slope,) = torch.autograd.grad(logits[victim, label] - logits[victim, toward], point)
            momentum = 0.75 * momentum - ball.unit(slope)
            length = ball.eps * (1 - 0.98 * step / (STEPS - 1))
            point = ball.project(point.detach() + length * ball.ascent(momentum), x)
    raise AssertionError("the turns have no end")


def main() -> None:
    """Attack the survivors of one context, and tell what broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("model", choices=("digits", "cifar10-wrn10-2"))
    parser.add_argument("--context", choices=("joint", "solo", "alone", "composed"), default="composed")
    parser.add_argument("--passes", type=int, default=740)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everyone", action="store_true", help="attack every sample that is right, for comparison")
    options = parser.parse_args()
    began, results = time.process_time(), Results.load(options.results)
    hpm = load_checkpoint(reference_path(options.model)).model
    assert isinstance(hpm, HPM)
    data = load_samples("digits") if options.model == "digits" else cifar10()
    left = results.samples.query("target == 'defense' and context == @options.context and clean_correct")
    left = left if options.everyone else left[left["robust"]]
    budget = CompositionBudget()
    chosen = torch.tensor(sorted(results.batches["index"]))
    first = torch.arange(int(chosen.max()) + 1)
    data = Samples.of(data.images(first), data.y[first])
    drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(len(chosen)))[: budget.pool]
    pool = chosen[drawn] if options.context == "composed" else None  # as `CleanBatches.pool` draws it
    threat = tomllib.loads(results.run["protocol"]["text"])["threat"]
    ball = Ball(threat["norm"], float(Fraction(threat["eps"])))
    groups = results.batches.groupby("batch")["index"].apply(list)
    broken: dict[int, int] = {}
    if options.context == "joint":
        for number, rows in left.groupby("batch"):
            seats = torch.tensor(groups[number])
            places = [groups[number].index(i) for i in rows["index"]]
            hits = together(hpm, data.x[seats], data.y[seats], places, ball, options.passes, options.seed)
            broken |= {int(seats[row]): made for row, made in hits.items()}
    for size in sorted({len(group) for group in groups} if options.context != "joint" else ()):
        rows = left[left["batch"].map(groups.map(len)) == size]
        if rows.empty:
            continue
        own = [[j for j in groups[batch] if j != i] for batch, i in zip(rows["batch"], rows["index"], strict=True)]
        beside = torch.tensor(own)[:, : 0 if options.context == "alone" else None]
        broken |= Adaptive(hpm, data, ball, rows, beside, pool, options.seed).run(options.passes)
    seconds = time.process_time() - began
    print(
        f"{options.context}, seed {options.seed}: {len(broken)} of {len(left)} broken within {options.passes} passes "
        f"each, in {seconds:.0f} s of CPU" + ("" if options.everyone else f"; after so many passes: {broken}")
    )


if __name__ == "__main__":
    main()
