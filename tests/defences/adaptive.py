"""Attacks that know the defence: they search through a differentiable form of it, and judge every point on itself.

Each returns which samples are left. They share no search with the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_eval.attacks import Ball

Logits = Callable[[Tensor], Tensor]
"""From a batch of images ``(B, C, H, W)`` to logits ``(B, k)``."""


def lead(logits: Tensor, y: Tensor, toward: Tensor | None = None) -> Tensor:
    """The label's logit less the best other one, or less that of a class ``(B,)``."""
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    if toward is not None:
        return own - logits.gather(1, toward.unsqueeze(1)).squeeze(1)
    return own - logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(dim=1)


def right(decide: Logits, x: Tensor, y: Tensor) -> Tensor:
    """Whether the real defence is right, ``(B,)``."""
    with torch.no_grad():
        return decide(x).argmax(dim=1) == y


SEED: ContextVar[int] = ContextVar("seed", default=0)
"""Of the starts and draws of every attack."""


@dataclass(frozen=True)
class Effort:
    """How long to search.

    Attributes:
        steps: of one descent.
        restarts: descents against all classes at once, through each route.
        targeted: descents towards each other class, through each route.
        classes: how many of the other classes, the likeliest first.
        sweeps: pixels changed one at a time, the one that serves best first (Linf alone).
        nearest: of the samples left, those with the lowest leads, whose pixels are changed so.
    """

    steps: int = 30
    restarts: int = 4
    targeted: int = 1
    classes: int = 5
    sweeps: int = 24
    nearest: int = 10


DEEP = Effort(steps=40, restarts=8, targeted=2, sweeps=40, nearest=16)
"""For defences that are constant but for jumps, where single pixels and other starts find more."""


def descent(
    route: Logits, x: Tensor, y: Tensor, ball: Ball, start: Tensor, *, toward: Tensor | None, entropy: bool, steps: int
) -> Iterator[Tensor]:
    """PGD with momentum and a falling step size; every point."""
    point, momentum = start, torch.zeros_like(x)
    for step in range(steps):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            logits = route(point)
            loss = -F.cross_entropy(logits, y, reduction="sum") if entropy else lead(logits, y, toward).sum()
            (slope,) = torch.autograd.grad(loss, point)
        momentum = 0.75 * momentum - ball.unit(slope.nan_to_num(0.0))
        length = ball.eps * (1 - 0.98 * step / max(1, steps - 1))
        point = ball.project(point.detach() + length * ball.ascent(momentum), x)
        yield point


def plans(x: Tensor, y: Tensor, routes: Sequence[Logits], effort: Effort) -> Iterator[tuple[Logits, int, bool]]:
    """Which descents are made: the route, the rank of the class aimed at (0 for all), and whether on cross-entropy."""
    with torch.no_grad():
        classes = min(routes[0](x[:2]).shape[1] - 1, effort.classes)
    for turn, route in itertools.product(range(effort.restarts), routes):
        yield route, 0, turn % 3 == 2
    for _, rank, route in itertools.product(range(effort.targeted), range(1, classes + 1), routes):
        yield route, rank, False


def alone(
    decide: Logits, routes: Sequence[Logits], x: Tensor, y: Tensor, ball: Ball, *,
    score: Logits | None = None, effort: Effort = Effort(),
) -> Tensor:  # fmt: skip
    """Which samples are left of a defence that decides each image by itself.

    Args:
        decide: the real defence.
        routes: differentiable forms of it.
        x: images ``(N, C, H, W)``.
        y: labels ``(N,)``.
        ball: the perturbation set.
        score: the defence's own logits before they are hidden, for the search that needs no gradient; else ``decide``.
        effort: how long to search.
    """
    draw, proof = torch.Generator().manual_seed(SEED.get()), x.clone()
    left, lowest = _asked(decide, score, x, y)
    best = x.clone()
    for turn, (route, rank, entropy) in enumerate(plans(x, y, routes, effort)):
        rows = left.nonzero().flatten()
        if not len(rows):
            break
        start = ball.random(x[rows], draw) if turn % 2 else best[rows]
        toward = None if rank == 0 else _ranked(route, best[rows], y[rows], rank)
        for point in descent(
            route, x[rows], y[rows], ball, start, toward=toward, entropy=entropy, steps=effort.steps
        ):  # fmt: skip
            stands, margin = _asked(decide, score, point, y[rows])
            better = margin < lowest[rows]
            best[rows[better]], lowest[rows[better]] = point[better], margin[better]
            broken = ~stands & left[rows]
            proof[rows[broken]], left[rows[broken]] = point[broken], False
    if ball.norm == "Linf":
        rows = left.nonzero().flatten()
        for row in rows[lowest[rows].argsort()[: effort.nearest]].tolist():
            found = _one_at_a_time(decide, score, x[row], int(y[row]), ball.eps, best[row], effort.sweeps)
            if found is not None:
                proof[row], left[row] = found, False
    return left | torch.cat([right(decide, *one) for one in zip(proof.split(1), y.split(1), strict=True)])


def _asked(decide: Logits, score: Logits | None, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the real defence is right, and the lead of its own logits or of those it hides."""
    with torch.no_grad():
        logits = decide(x)
        return logits.argmax(dim=1) == y, lead(logits if score is None else score(x), y)


def _ranked(route: Logits, x: Tensor, y: Tensor, rank: int) -> Tensor:
    """The class that comes so far down among the others."""
    with torch.no_grad():
        others = route(x).scatter(1, y.unsqueeze(1), -torch.inf)
    return others.topk(rank, dim=1).indices[:, -1]


def _one_at_a_time(
    decide: Logits, score: Logits | None, x: Tensor, label: int, eps: float, start: Tensor, sweeps: int
) -> Tensor | None:
    """Set the pixel that serves best to an end of its range, again and again; the point that breaks, if one does."""
    ends = ((x - eps).clamp(0, 1).flatten(), (x + eps).clamp(0, 1).flatten())
    point, lowest, pixels = start.flatten(), torch.inf, x.numel()
    for _ in range(sweeps):
        tried = torch.cat([torch.where(torch.eye(pixels, dtype=torch.bool), end, point) for end in ends])
        images, labels = tried.view(-1, *x.shape), torch.full((2 * pixels,), label)
        stands, margins = _asked(decide, score, images, labels)
        if not stands.all():
            return images[~stands][0]
        if not float(margins.min()) < lowest:
            return None
        lowest, point = float(margins.min()), tried[int(margins.argmin())]
    return None


def together(
    decide: Logits, routes: Sequence[Logits], x: Tensor, y: Tensor, ball: Ball, *,
    effort: Effort = Effort(),
) -> Tensor:  # fmt: skip
    """Which samples of one batch are left where the attacker writes every image of it.

    First every image moves against its own label, then the whole batch against one survivor after another.
    """
    draw, left = torch.Generator().manual_seed(SEED.get()), right(decide, x, y)
    best, lowest = x.repeat(len(x), *([1] * x.ndim)).view(len(x), *x.shape), torch.full((len(x),), torch.inf)

    def judge(point: Tensor) -> None:
        nonlocal left
        with torch.no_grad():
            logits = decide(point)
        left &= logits.argmax(dim=1) == y
        margin = lead(logits, y)
        better = margin < lowest
        best[better], lowest[better] = point, margin[better]

    for turn, (route, rank, entropy) in enumerate(plans(x, y, routes, effort)):
        start = ball.random(x, draw) if turn % 2 else x
        toward = None if rank == 0 else _ranked(route, x, y, rank)
        for point in descent(route, x, y, ball, start, toward=toward, entropy=entropy, steps=effort.steps):
            judge(point)
    for turn, route in itertools.product(range(effort.restarts), routes):
        for row in left.nonzero().flatten().tolist():
            if not left[row]:
                continue
            start = best[row] if turn % 2 == 0 else ball.random(x, draw)
            rank = int(torch.randint(1, 4, (), generator=draw))

            def victim(point: Tensor, row: int = row, route: Logits = route) -> Tensor:
                return route(point)[row : row + 1]

            toward = _ranked(victim, start, y[row : row + 1], rank)
            for point in descent(victim, x, y[row : row + 1], ball, start, toward=toward, entropy=False,
                                 steps=effort.steps):  # fmt: skip
                judge(point)
                if not left[row]:
                    break
    return left


FIRST, ANSWERS, WRONG = 99, 999, 563
"""A sample is broken when so many of so many fresh answers are wrong, as in the engine; fewer answers choose what to
ask about."""


def wrong_share(decide: Logits, x: Tensor, y: Tensor, answers: int) -> Tensor:
    """The share of a stochastic defence's answers that are wrong, ``(B,)``; the chance is every row's own."""
    wrong = torch.zeros(len(x))
    for count in [50] * (answers // 50) + [answers % 50] * (answers % 50 > 0):
        wrong += (~right(decide, x.repeat(count, 1, 1, 1), y.repeat(count))).view(count, -1).sum(dim=0)
    return wrong / answers


def by_expectation(
    decide: Logits, routes: Sequence[Logits], x: Tensor, y: Tensor, ball: Ball, *,
    effort: Effort = Effort(restarts=4), draws: int = 24,
) -> Tensor:  # fmt: skip
    """Which samples are left of a stochastic defence: gradients of the mean lead over many draws.

    ``routes`` give logits of one draw. What most of 99 answers get wrong is asked about 999 times more.
    """
    with torch.random.fork_rng():
        torch.manual_seed(SEED.get())
        draw = torch.Generator().manual_seed(SEED.get())
        left = wrong_share(decide, x, y, ANSWERS) < 0.5
        for turn, (route, rank, entropy) in enumerate(plans(x, y, routes, effort)):
            rows = left.nonzero().flatten()
            if not len(rows):
                break
            images, labels = x[rows], y[rows]

            def mean(point: Tensor, route: Logits = route) -> Tensor:
                out = route(point.repeat(draws, 1, 1, 1)).log_softmax(dim=1)
                return out.view(draws, len(point), -1).mean(dim=0)

            start = ball.random(images, draw) if turn % 2 else images
            toward = None if rank == 0 else _ranked(mean, images, labels, rank)
            points = list(descent(mean, images, labels, ball, start, toward=toward, entropy=entropy,
                                  steps=effort.steps))  # fmt: skip
            shares = torch.stack([wrong_share(decide, point, labels, FIRST) for point in points[9::10]])
            chosen = torch.stack(points[9::10])[shares.argmax(dim=0), torch.arange(len(rows))]
            likely = (shares.amax(dim=0) > 0.5).nonzero().flatten()
            if len(likely):
                asked = wrong_share(decide, chosen[likely], labels[likely], ANSWERS) * ANSWERS
                left[rows[likely[asked.round() >= WRONG]]] = False
        return left
