"""Surrogates found, not asked for: candidates made from the target's own code, and the choice among them.

Candidates are made where no surrogate's gradient is true enough, and tried on the hard target: first how well their
gradient predicts its changes (`msa_eval.auditing.gradient_truth`), then what a short attack through them does to it.
What is kept is attacked like any other surrogate; every point is judged by the target itself, as always.

References:
    Automated Discovery of Adaptive Attacks on Adversarial Defenses (Yao et al., 2021), arXiv:2102.11860, which searches
    over BPDA and the removal of layers, for defences rewritten in its own modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import margin_loss
from msa_eval.auditing.candidates import (
    BLIND,
    Attacked,
    Candidate,
    averages,
    find_stages,
    guarded,
    inner_models,
    own_code,
    passed_over,
    renamed,
)
from msa_eval.auditing.companion_gradients import companions_matter, reaches_companions
from msa_eval.auditing.finding import Finding, Tried
from msa_eval.auditing.gradient_truth import HardResponse, Truth
from msa_eval.auditing.truth_sign import CLEARLY, limit_of
from msa_eval.defense.contract import Defense
from msa_eval.defense.micro_batches import is_out_of_memory
from msa_eval.judging.clean_batches import CleanBatches
from msa_eval.judging.usable_surrogates import More
from msa_eval.progress import Progress, silent, ticking
from msa_eval.randomness import seeded
from msa_eval.surrogates.registry import Surrogate

TRUE = 0.97
"""A gradient of at least this figure is not doubted."""

PLAIN = frozenset({"ste", "fc-oracle"})
"""The surrogates of a target that brings none."""

AGREES = 0.9
"""Where steps show nothing, a surrogate that takes so many points for right or wrong as the target does is close."""

ROWS, STEPS, KEPT, TRIED = 32, 10, 3, 8
"""Images and steps of a short attack; surrogates kept; candidates that are tried by an attack, at most."""


def find_surrogates(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    correct: Tensor,
    ball: Ball,
    existing: Sequence[Surrogate],
    *,
    brought: bool,
    batch_dependent: bool,
    draws: int = 1,
    seed: int = 0,
    search: bool = True,
    together: bool = True,
) -> Finding:
    """Measure how true the gradients of a target's surrogates are, and find better ones where they are not.

    The target is left as it was: hooks and replaced calls last for a pass each.

    Args:
        defense: the target, without gradients of its weights.
        x: a clean batch ``(B, C, H, W)``.
        y: labels ``(B,)``.
        correct: which are right on it ``(B,)``.
        ball: the protocol's.
        existing: the surrogates that there are, with a gradient; maybe none.
        brought: whether some are the target's own, beside its plain gradient.
        batch_dependent: whether its decision looks at companions: then the batch stays whole.
        draws: answers averaged, of a target that answers at random.
        seed: of everything drawn.
        search: whether to look for more.
        together: whether the attacker moves companions too.
    """
    looked = _Search(defense, x, y, correct, ball, batch_dependent, draws, seed, together)
    return looked.find(existing, brought=brought, search=search)


class SurrogateSearch:
    """A search for surrogates on the first clean batch of a target, made when its surrogates are known.

    Args:
        clean: the target's clean batches.
        ball: the protocol's.
        seed: of everything drawn.
        search: whether to look for more surrogates than there are.
        together: whether the attacker moves companions too.
        progress: shows that it is under way.

    Attributes:
        finding: what was found; ``None`` before `more` was asked for.
    """

    def __init__(
        self, clean: CleanBatches, ball: Ball, *, seed: int, search: bool = True, together: bool = True,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        self._progress = progress
        self._clean, self._ball, self._seed, self._search, self._together = clean, ball, seed, search, together
        self.finding: Finding | None = None

    def more(self, existing: Sequence[Surrogate]) -> More:
        """Find more surrogates than there are; a failure leaves it at those, and is noted."""
        batch, clean = self._clean.batch(0), self._clean
        try:
            with ticking(self._progress, 1, "how true gradients are"):
                self.finding = find_surrogates(
                    clean.defense, batch.x, batch.y, batch.correct, self._ball, existing,
                    brought=any(surrogate.name not in PLAIN for surrogate in existing),
                    batch_dependent=clean.batch_dependent, draws=clean.eot, seed=self._seed, search=self._search,
                    together=self._together,
                )  # fmt: skip
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.finding = Finding((), {}, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        truths = self.finding.truths
        beside = max((s.name for s in existing if s.name in truths), key=lambda name: truths[name].figure, default=None)
        if beside is not None and truths[beside].figure < BLIND:
            beside = None
        return More([guarded(surrogate) for surrogate in self.finding.surrogates], beside, looked=self._search)


class _Search:
    """A search on one batch."""

    def __init__(
        self, defense: Defense, x: Tensor, y: Tensor, correct: Tensor, ball: Ball,
        batch_dependent: bool, draws: int, seed: int, together: bool = True,
    ) -> None:  # fmt: skip
        if not batch_dependent:
            rows = (correct if bool(correct.any()) else torch.ones_like(correct)).nonzero().flatten()[:ROWS]
            x, y, correct = x[rows], y[rows], correct[rows]
        self.defense, self.x, self.y, self.ball = defense, x, y, ball
        self.counted = correct if bool(correct.any()) else torch.ones_like(correct)
        self.batch_dependent, self.draws, self.seed = batch_dependent, draws, seed
        self.together, self.unreached = together and batch_dependent and len(x) > 1, False

    def find(self, existing: Sequence[Surrogate], *, brought: bool, search: bool) -> Finding:
        """Find what there is."""
        self.hard = HardResponse(
            self.defense, self.x, self.y, self.ball, counted=self.counted,
            climber=existing[0] if existing else None, interacting=self.batch_dependent, seed=self.seed,
            draws=self.draws,
        )  # fmt: skip
        truths = {surrogate.name: self.hard.truth_of(surrogate) for surrogate in existing}
        best = max((truth.figure for truth in truths.values()), default=0.0)
        signal = max((truth.signal for truth in truths.values()), default=0.0)
        self.unreached = self.together and companions_matter(self.hard) and not any(map(self._reaches, existing))
        if not search or (brought and best >= limit_of(self.batch_dependent) and not self.unreached):
            return Finding((), truths, signal=signal, interacting=self.batch_dependent, brought=brought,
                           unreached=self.unreached)  # fmt: skip
        stages = find_stages(self.defense, self.x, seed=self.seed)
        candidates = list(inner_models(self.defense, self.x, stages, seed=self.seed))
        if best < TRUE or self.unreached:
            candidates += [*own_code(self.defense), *passed_over(self.defense, self.x, stages)]
        candidates = renamed(candidates)
        self._measure(candidates, existing)
        if max([best, *(c.truth.figure for c in candidates if c.truth)]) < limit_of(self.batch_dependent):
            known = [(truths[s.name].figure, s) for s in existing]
            known += [(c.truth.figure, c.surrogate) for c in candidates if c.truth is not None]
            more = list(averages(known, self.ball, self.x[0].numel()))
            self._measure(more, existing)
            candidates += more
        kept, agreement = self._choose(candidates, existing, truths)
        found = {c.surrogate.name: c.truth for c in kept if c.truth}
        tried = [
            Tried(
                c.surrogate.name, c.how, None if c.truth is None else round(c.truth.figure, 3),
                None if c.attacked is None else int(c.attacked.broken[self.counted].sum()), c in kept, c.reason,
            )
            for c in candidates
        ]  # fmt: skip
        signal = max([signal, *(truth.signal for truth in found.values())])
        return Finding(
            [c.surrogate for c in kept], truths | found, tried, signal, agreement,
            interacting=self.batch_dependent, brought=brought, unreached=self.unreached,
        )  # fmt: skip

    def _reaches(self, surrogate: Surrogate) -> bool:
        return reaches_companions(self.hard, surrogate)

    def _measure(self, candidates: Sequence[Candidate], existing: Sequence[Surrogate]) -> None:
        """Find each candidate's figure; one that fails, or does what another does, is dropped with the reason."""
        seen: list[tuple[str, Tensor]] = []
        for surrogate in existing:
            seen.append((surrogate.name, self.hard.gradient(surrogate, self.x)))
        for candidate in candidates:
            name = candidate.surrogate.name
            try:
                gradient = self.hard.gradient(candidate.surrogate, self.x)
                if not bool(gradient.abs().max() > 0):
                    candidate.reason = "no gradient"
                    continue
                same = [other for other, known in seen if _same(gradient, known)]
                if same:
                    candidate.reason = f"the same gradient as {same[0]}"
                    continue
                candidate.truth = self.hard.truth_of(candidate.surrogate)
                seen.append((name, gradient))
            except Exception as error:
                candidate.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _choose(
        self, candidates: Sequence[Candidate], existing: Sequence[Surrogate], truths: dict[str, Truth]
    ) -> tuple[list[Candidate], float]:
        """Attack through the most promising candidates, and keep those that do more than what there is."""
        ranked = sorted((c for c in candidates if c.truth), key=lambda c: -(c.truth or Truth(0, 0, 0)).figure)
        best = max((truth.figure for truth in truths.values()), default=0.0)
        worth = [c for c in ranked if c.always or (c.truth and c.truth.figure > max(best, c.least) + CLEARLY)]
        worth = worth[:TRIED]
        reaching = self._reaching(ranked)
        worth = sorted([*worth, *(c for c in reaching if c not in worth)], key=candidates.index)
        for candidate in ranked:
            if candidate not in worth:
                candidate.reason = "no truer than what there is"
        if not worth:
            return [], self._agreement_of(existing, truths)
        base = self._base(existing, truths)
        for candidate in worth:
            try:
                candidate.attacked = self._attack(candidate.surrogate)
            except Exception as error:
                candidate.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        kept = self._greedy([c for c in worth if c.attacked], base, best)
        if max([truth.signal for truth in truths.values()] + [c.truth.signal for c in ranked if c.truth]) < BLIND:
            close = [c for c in worth if c.attacked and c.attacked.agreement > AGREES and c not in kept]
            close.sort(key=lambda c: (-int(c.attacked.broken.sum()), c.surrogate.passes) if c.attacked else (0, 0))
            kept = [*kept, *close][:KEPT]
        if reaching and not any(c.attacked and self._reaches(c.surrogate) for c in kept):
            kept = [*reaching, *kept][:KEPT]
        for candidate in worth:
            if candidate not in kept and not candidate.reason:
                candidate.reason = "a short attack through it did no more than others"
        agreements = [c.attacked.agreement for c in kept if c.attacked] + ([] if base is None else [base.agreement])
        return kept, max(agreements, default=0.0)

    def _reaching(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """Where no gradient of the target's own reaches companions: the truest one that does, on features if any is."""
        if not self.unreached:
            return []
        limit = limit_of(self.batch_dependent)
        found = [c for c in ranked if c.truth and c.truth.figure >= limit and self._reaches(c.surrogate)]
        return sorted(found, key=lambda c: c.surrogate.on_images)[:1]

    def _greedy(self, worth: Sequence[Candidate], base: Attacked | None, best: float) -> list[Candidate]:
        """The best first, then whatever adds to those before it."""
        kept: list[Candidate] = []
        reached = base.margin_loss if base is not None else torch.full_like(self.x[:, 0].flatten(1)[:, 0], -torch.inf)
        left = list(worth)
        while left and len(kept) < KEPT:
            scored = [(self._gain(c, reached), c.truth.figure if c.truth else 0.0, c) for c in left]
            # Of two that gain as much the cheaper, and of these the truer.
            gain, _, candidate = max(scored, key=lambda score: (score[0], -score[2].surrogate.passes, score[1]))
            truer = not kept and candidate.truth is not None and candidate.truth.figure > best + CLEARLY
            if not kept and gain <= 0:
                true_ones = [(figure, c) for _, figure, c in scored if figure > best + CLEARLY]
                if not true_ones:
                    break
                candidate = max(true_ones, key=lambda pair: pair[0])[1]
            elif gain <= 0 and not truer:
                break
            left.remove(candidate)
            kept.append(candidate)
            assert candidate.attacked is not None
            reached = torch.maximum(reached, candidate.attacked.margin_loss)
        return kept

    def _gain(self, candidate: Candidate, reached: Tensor) -> float:
        """What a short attack adds to what others reached: samples broken; then, of those left, the share it leads on.

        A sample or two may be chance, and so is a lead on little more than half.
        """
        assert candidate.attacked is not None
        counted, found = self.counted, candidate.attacked.margin_loss
        more = int(((found > 0) & (reached <= 0) & counted).sum())
        n = int(counted.sum())
        if more >= max(2, 0.04 * n):
            return float(more)
        left = counted & (found <= 0) & (reached <= 0)
        if int(left.sum()) < 6:
            return 0.0
        scale = found[left].abs().clamp_min(1e-12)
        leads = ((found[left] - reached[left]) / scale > 1e-3).float().mean()
        return float(leads) if leads > 0.75 else 0.0

    def _base(self, existing: Sequence[Surrogate], truths: dict[str, Truth]) -> Attacked | None:
        """What short attacks through the two truest surrogates there are reach together."""
        ranked = sorted(existing, key=lambda s: -truths[s.name].figure)[:2]
        attacked = [self._attack(surrogate) for surrogate in ranked]
        if not attacked:
            return None
        margins = torch.stack([one.margin_loss for one in attacked]).amax(dim=0)
        return Attacked(margins, max(one.agreement for one in attacked))

    def _agreement_of(self, existing: Sequence[Surrogate], truths: dict[str, Truth]) -> float:
        """How often the truest one's class is the target's on the points of a search, where steps show nothing."""
        if not existing or max(truth.signal for truth in truths.values()) >= BLIND:
            return 1.0
        base = self._base(existing, truths)
        return 0.0 if base is None else base.agreement

    def _attack(self, surrogate: Surrogate) -> Attacked:
        """A short attack, each of its points judged by the hard target."""
        highest = torch.full_like(self.x[:, 0].flatten(1)[:, 0], -torch.inf)
        same: list[Tensor] = []
        differs: list[Tensor] = []

        def model(points: Tensor) -> Tensor:
            nonlocal highest
            with seeded(self.seed):
                given = points if surrogate.on_images else self.defense.features(points)
                logits = surrogate.logits(self.defense, given).float()
            hard = self.hard.margin_loss(points.detach())
            highest = torch.maximum(highest, hard)
            seen = margin_loss(logits.detach(), self.y)
            same.append(((seen > 0) == (hard > 0))[self.counted].float())
            differs.append((seen - hard).abs().max() > 1e-4 * hard.abs().max())
            return logits

        generator = torch.Generator().manual_seed(self.seed + 1)
        apgd(model, self.x, self.y, loss=margin_loss, ball=self.ball, steps=STEPS, generator=generator)
        return Attacked(highest, float(torch.cat(same).mean()) if bool(torch.stack(differs).any()) else 0.0)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two gradients are one, but for their size."""
    a, b = first.flatten(1), second.flatten(1)
    cosine = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-30)
    dead = (a == 0).all(dim=1) & (b == 0).all(dim=1)
    return bool(((cosine > 0.9999) | dead).all())
