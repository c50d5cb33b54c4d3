"""The subject of an audit: a target with clean batches, and what is measured on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.batch import Batch
from msa_eval.attacks.losses import LOSSES, MIN_CLASSES, margin_loss
from msa_eval.attacks.square import square
from msa_eval.auditing import rules
from msa_eval.auditing.companions import RegroupedBatches
from msa_eval.auditing.evidence_signs import gradient_free_only
from msa_eval.auditing.inner_gradients import counting_gradients
from msa_eval.auditing.rules import Mask
from msa_eval.auditing.sign import Change, Sign, change
from msa_eval.auditing.state_guard import answer
from msa_eval.defense.contract import Defense, decide, left_training
from msa_eval.errors import AttackError
from msa_eval.judging.judged_batch import JudgedBatch
from msa_eval.judging.search_state import Setting
from msa_eval.judging.usable_surrogates import answer_with_gradient, raised_by
from msa_eval.progress import Progress, silent
from msa_eval.randomness import all_seeded
from msa_eval.surrogates.builtin import STE
from msa_eval.surrogates.registry import Surrogate

STEPS, LARGE_STEPS, QUERIES = 40, 20, 200
DRAWS, EOT = 9, 4
"""Of a target that answers at random: answers to the final points of a run, and answers a gradient is averaged over."""


@dataclass(frozen=True)
class _Attacked:
    """What runs through one surrogate, or none, did to all samples.

    Attributes:
        wrong: the share of answers in which the target got a clean-right sample wrong ``(N,)``.
        losses: the surrogate's loss at each point asked about ``(T, N)``; ``(0, N)`` for a query attack.
    """

    wrong: Tensor
    losses: Tensor

    @property
    def broken(self) -> Mask:
        """The samples broken: wrong in most answers."""
        return np.asarray((self.wrong > 0.5).cpu())

    @property
    def surely(self) -> Mask:
        """The samples wrong in all answers, which is beyond chance where others leave them right."""
        return np.asarray((self.wrong == 1).cpu())


class Probes:
    """A target with the clean batches that it is measured on."""

    def __init__(
        self,
        defense: Defense,
        batches: Sequence[Batch],
        ball: Ball,
        batch_dependent: bool,
        num_classes: int,
        seed: int,
    ) -> None:
        self.defense, self.batches, self.ball = defense, batches, ball
        self.batch_dependent, self.seed = batch_dependent, seed
        self.n = sum(len(batch.y) for batch in batches)
        self.right = torch.cat([batch.correct for batch in batches])
        self.losses = {name: loss for name, loss in LOSSES.items() if num_classes >= MIN_CLASSES[name]}
        self.chance = self._between(lambda batch: self._ask(batch.x), lambda batch: self._ask(batch.x, other=True))
        self.stochastic = self.chance.drift > rules.SAME

    def _ask(self, x: Tensor, *, other: bool = False) -> Tensor:
        return answer(self.defense, x, self.seed + other)

    def _between(self, before: Callable[[Batch], Tensor], after: Callable[[Batch], Tensor]) -> Change:
        """Compare two ways to answer all batches."""
        pairs = [(before(batch), after(batch)) for batch in self.batches]
        return change(torch.cat([first for first, _ in pairs]), torch.cat([second for _, second in pairs]))

    def generator(self, *key: object) -> torch.Generator:
        """A generator for one purpose."""
        digest = hashlib.sha256("/".join(map(str, (self.seed, "audit", *key))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def measure(
        self, surrogates: Sequence[Surrogate], progress: Progress = silent, *, followed: bool = True
    ) -> list[Sign]:
        """Measure all signs; those of white-box attacks where the protocol follows gradients."""
        steps: list[Callable[[], list[Sign]]] = [
            self._answers, self.determinism, self._inside, lambda: self.gradients(surrogates, followed),
            *([lambda: self.attacks(surrogates), lambda: self._disagreements(surrogates)] if followed else []),
        ]  # fmt: skip
        found = [] if followed else [gradient_free_only(0.0)]
        return found + [sign for step in progress(steps, "audit") for sign in step()]

    def _answers(self) -> list[Sign]:
        clean = torch.cat([batch.logits for batch in self.batches])
        labels, classes = (torch.cat(parts).cpu().numpy() for parts in ([b.y for b in self.batches], [clean.argmax(1)]))
        chance = rules.clean_at_chance(labels, classes, clean.shape[1])
        return [chance, rules.probabilities(clean), rules.training_mode(left_training(self.defense))]

    def _inside(self) -> list[Sign]:
        with counting_gradients() as made:
            self._ask(self.batches[0].x)
        return [rules.optimises_inside(made.count)]

    def _disagreements(self, surrogates: Sequence[Surrogate]) -> list[Sign]:
        return [rules.surrogate_disagrees({s.name: self.disagreement(s) for s in surrogates})] if surrogates else []

    def determinism(self) -> list[Sign]:
        """Randomness, state and batch dependence."""
        repeated, after_use = self._repeats(self._ask), self._after_use(self._ask)
        moves = max(repeated.drift, after_use.drift) > rules.SAME
        seeded_too = self._ask_all_seeded
        others = moves and max(self._repeats(seeded_too).drift, self._after_use(seeded_too).drift) <= rules.SAME
        noise = self.chance if self.stochastic else None
        return [
            rules.randomness(self.chance, repeats=not moves),
            rules.state(repeated, after_use, other_generators=others),
            rules.batch_dependence(
                RegroupedBatches(self._ask, self.batches, self.ball, self.generator).changes(),
                declared=self.batch_dependent,
                noise=noise,
            ),
        ]

    def _ask_all_seeded(self, x: Tensor) -> Tensor:
        with all_seeded(self.seed):
            return self._ask(x)

    def _repeats(self, ask: Callable[[Tensor], Tensor]) -> Change:
        return self._between(lambda batch: ask(batch.x), lambda batch: ask(batch.x))

    def _after_use(self, ask: Callable[[Tensor], Tensor]) -> Change:
        """Ask about the first batch before and after passes with gradients and of the others."""
        first = self.batches[0]
        before = ask(first.x)
        self._gradient_pass(first.x)
        for batch in self.batches[1:]:
            ask(batch.x)
        return change(before, ask(first.x))

    def _gradient_pass(self, x: Tensor) -> None:
        x = x.detach().requires_grad_()
        try:
            logits = self.defense.logits(self.defense.features(x))
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), x, allow_unused=True)
        except RuntimeError:
            pass  # a decision that no gradient may enter; the other signs tell of it

    def gradients(self, surrogates: Sequence[Surrogate], followed: bool) -> list[Sign]:
        """Zero gradients through all surrogates, and through the defence's own decision."""
        dead = {surrogate.name: self._dead(surrogate) for surrogate in surrogates}
        own = dead.get(STE.name)
        own = self._dead(STE) if own is None else own
        dead = dead or ({} if followed else {STE.name: own})
        everywhere = torch.stack(list(dead.values())).all(dim=0) if dead else torch.ones_like(own)
        share = self._share(everywhere)
        raised = raised_by(STE, self.defense, self.batches[0]) if bool(own.any()) else ""
        return [
            rules.zero_gradients(share, {n: self._share(mask) for n, mask in dead.items()}, followed=followed),
            rules.own_gradient_zero(self._share(own), share, raised),
        ]

    def _share(self, mask: Tensor) -> float:
        """The share of the clean-right samples; of all where none is right."""
        counted = mask[self.right] if bool(self.right.any()) else mask
        return float(counted.float().mean())

    def _dead(self, surrogate: Surrogate) -> Tensor:
        """The samples ``(N,)`` without a finite, non-zero gradient under any loss, on clean images and random ones."""
        rows = []
        for batch in self.batches:
            start = self.ball.random(batch.x, self.generator("start", batch.number))
            rows.append(self._dead_at(surrogate, batch.x, batch.y) & self._dead_at(surrogate, start, batch.y))
        return torch.cat(rows)

    def _dead_at(self, surrogate: Surrogate, x: Tensor, y: Tensor) -> Tensor:
        dead = torch.ones_like(y, dtype=torch.bool)
        x = x.detach().requires_grad_()
        try:
            logits = surrogate.logits(self.defense, x if surrogate.on_images else self.defense.features(x))
        except RuntimeError:
            return dead  # such as a decision in NumPy, which a tensor with a gradient can't enter
        if not logits.requires_grad:
            return dead
        for loss in self.losses.values():
            (gradient,) = torch.autograd.grad(loss(logits, y).sum(), x, retain_graph=True, allow_unused=True)
            if gradient is not None:
                flat = gradient.flatten(1)
                dead = dead & ~(flat.isfinite().all(dim=1) & (flat != 0).any(dim=1))
        return dead

    def _follows(self, surrogate: Surrogate) -> bool:
        """Whether a gradient leads from a surrogate to the images."""
        return answer_with_gradient(surrogate, self.defense, self.batches[0]) is not None

    def disagreement(self, surrogate: Surrogate) -> float:
        """The share of clean samples on which a surrogate's class differs from the target's.

        Of a target that answers at random the classes are those of most draws, and what the target differs from itself
        is taken off, with two standard errors: single draws disagree by chance.
        """

        def stands_in(batch: Batch) -> Tensor:
            return surrogate.logits(self.defense, batch.x if surrogate.on_images else batch.z)

        with torch.no_grad():
            if not self.stochastic:
                return self._differ(self._classes(stands_in), self._classes(lambda batch: batch.logits))
            classes, own, again = (self._classes(ask, DRAWS) for ask in (stands_in, self._hard, self._hard))
        seen, chance = self._differ(classes, own), self._differ(again, own)
        return float(max(seen - chance - 2 * ((seen + chance) / self.n) ** 0.5, 0.0))

    def _hard(self, batch: Batch) -> Tensor:
        return decide(self.defense, batch.z)

    def _classes(self, ask: Callable[[Batch], Tensor], draws: int = 1) -> Tensor:
        """The class that most answers to each image are for ``(N,)``."""
        drawn = [torch.cat([ask(batch).argmax(dim=1) for batch in self.batches]) for _ in range(draws)]
        return torch.stack(drawn).mode(dim=0).values

    def _differ(self, first: Tensor, second: Tensor) -> float:
        return float((first != second).float().mean())

    def attacks(self, surrogates: Sequence[Surrogate]) -> list[Sign]:
        """What short white-box and gradient-free runs show; each run serves several signs."""
        forty = {surrogate.name: self._apgd(surrogate) for surrogate in surrogates}
        broken = {name: run.broken for name, run in forty.items()}
        found = [self._gradient_free(surrogates, broken)]
        if not surrogates:
            return found
        direct = broken.get(STE.name)
        if direct is None and STE.applies(self.defense) and self._follows(STE):
            direct = self._apgd(STE).broken
        if direct is not None:
            others = {name: mask for name, mask in broken.items() if name != STE.name}
            found.append(rules.transfer_beats_direct(direct, others))
        elif len(broken) < 2:
            found.append(rules.transfer_beats_direct(np.zeros(self.n, dtype=bool), {}))
        one = {surrogate.name: self._apgd(surrogate, one_step=True) for surrogate in surrogates}
        found.append(rules.one_step_beats_forty(_counts(one), _counts(forty), self.n))
        found.append(rules.loss_not_rising({s.name: self._rise(s, forty[s.name].losses) for s in surrogates}))
        found.append(self._large_eps(surrogates))
        return found

    def _gradient_free(self, surrogates: Sequence[Surrogate], broken: Mapping[str, Mask]) -> Sign:
        """What Square breaks beyond the white-box runs; before that counts as a sign, these try all losses anew."""
        nothing = np.zeros(self.n, dtype=bool)
        only = self._square().surely & ~np.logical_or.reduce([nothing, *broken.values()])
        sign = rules.gradient_free_beats_white_box(int(only.sum()), self.n)
        if not sign.fired:
            return sign
        again = [self._apgd(surrogate, loss=loss, restart=1).broken for surrogate in surrogates for loss in self.losses]
        only = only & ~np.logical_or.reduce([nothing, *again])
        return rules.gradient_free_beats_white_box(int(only.sum()), self.n)

    def _setting(self) -> Setting:
        return Setting(eot=EOT if self.stochastic else 1)

    def _apgd(
        self,
        surrogate: Surrogate,
        *,
        loss: str = "margin",
        ball: Ball | None = None,
        steps: int = STEPS,
        one_step: bool = False,
        restart: int = 0,
    ) -> _Attacked:
        """APGD; ``one_step`` is a single step of length ε from the clean images."""
        ball = ball or self.ball
        wrong, losses = [], []
        for batch in self.batches:
            attacked = JudgedBatch(
                self.defense, surrogate, batch, ball, mixes_rows=self.batch_dependent, setting=self._setting()
            )
            watched = _Watched(attacked, batch.y)
            generator = self.generator(surrogate.name, loss, steps, one_step, ball, restart, batch.number)
            found = apgd(
                watched, batch.x, batch.y, loss=self.losses[loss], ball=ball, steps=1 if one_step else steps,
                start=batch.x if one_step else None, first_step=1.0 if one_step else 2.0,
                generator=generator, draws=attacked.eot,
            )  # fmt: skip
            wrong.append(self._judged(attacked, found.x))
            losses.append(watched.trace(attacked.eot))
        return _Attacked(torch.cat(wrong), torch.cat(losses, dim=1))

    def _square(self) -> _Attacked:
        wrong = []
        for batch in self.batches:
            attacked = JudgedBatch(self.defense, None, batch, self.ball, mixes_rows=self.batch_dependent)
            points = square(
                attacked, batch.x, batch.y, attacked=batch.correct, ball=self.ball, queries=QUERIES,
                generator=self.generator("square", batch.number),
            )  # fmt: skip
            wrong.append(self._judged(attacked, points))
        return _Attacked(torch.cat(wrong), torch.zeros(0, self.n))

    def _judged(self, attacked: JudgedBatch, points: Tensor) -> Tensor:
        """The share of answers ``(B,)`` in which a run got a clean-right sample wrong.

        Of a target that answers at random only the final points count, asked again and again: over many points,
        chance alone would break some.
        """
        outcome, batch = attacked.finish(points), attacked.batch
        if not self.stochastic:
            return (outcome.any_broken & batch.correct).float()
        with torch.no_grad():
            z = self.defense.features(points)
        wrong = [decide(self.defense, z).argmax(dim=1) != batch.y for _ in range(DRAWS)]
        return torch.stack(wrong).float().mean(dim=0) * batch.correct

    def _rise(self, surrogate: Surrogate, losses: Tensor) -> float:
        """How far a run raises the mean loss, in units of the change that its random start makes.

        Of a target that answers at random, that change is the root mean square, less what two answers to the same clean
        images differ by chance.
        """
        counted = self.right if bool(self.right.any()) else torch.ones_like(self.right)
        last = losses[-max(len(losses) // 4, 1) :].mean(dim=0)
        rise = float((last - losses[0])[counted].mean())
        clean = self._clean_loss(surrogate)
        if self.stochastic:
            chance = (self._clean_loss(surrogate) - clean)[counted].square().mean()
            moved = (losses[0] - clean)[counted].square().mean() - chance
            # A rise of less than two standard errors of the mean is none: half of four.
            unit = float(torch.maximum(moved, 16 * chance / counted.sum()).sqrt())
        else:
            unit = float((losses[0] - clean)[counted].abs().mean())
        return rise / max(unit, 1e-3 * rise, 1e-12)

    def _clean_loss(self, surrogate: Surrogate) -> Tensor:
        """The surrogate's margin loss on clean images ``(N,)``, the mean of as many draws as an attack takes."""
        with torch.no_grad():
            drawn = [
                torch.cat(
                    [
                        margin_loss(surrogate.logits(self.defense, b.x if surrogate.on_images else b.z).float(), b.y)
                        for b in self.batches
                    ]
                )
                for _ in range(self._setting().eot)
            ]
        return torch.stack(drawn).mean(dim=0)

    def _large_eps(self, surrogates: Sequence[Surrogate]) -> Sign:
        """Attack in a ball in which every image can be erased, until no sample is left."""
        pixels = self.batches[0].x[0].numel()
        ball = Ball(self.ball.norm, max(self.ball.erasing(pixels), self.ball.eps))
        words = f"{ball.norm} radius {ball.eps:.3g}"
        left = self.right.cpu().numpy()
        for surrogate in surrogates:
            try:
                left = left & ~self._apgd(surrogate, ball=ball, steps=LARGE_STEPS).broken
            except AttackError as error:
                return rules.large_eps(int(left.sum()), self.n, words, failure=str(error))
            if not left.any():
                break
        return rules.large_eps(int(left.sum()), self.n, words)


def _counts(runs: Mapping[str, _Attacked]) -> dict[str, int]:
    return {name: int(run.broken.sum()) for name, run in runs.items()}


class _Watched:
    """A trial as a model, its loss noted at each call; a gradient that is not finite counts as none."""

    def __init__(self, attacked: JudgedBatch, y: Tensor) -> None:
        self._trial, self._y = attacked, y
        self._losses: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)  # a node whose gradient can be mended before the attack sees it
            x.register_hook(lambda gradient: torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
        logits = self._trial(x)
        self._losses.append(margin_loss(logits.detach().float(), self._y))
        return logits

    def trace(self, draws: int) -> Tensor:
        """The loss at each point ``(T, B)``, the mean of its draws."""
        losses = torch.stack(self._losses)
        return losses.view(-1, draws, losses.shape[1]).mean(dim=1)
