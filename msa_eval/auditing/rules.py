"""The rules by which what was measured becomes a sign: a function a sign."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from msa_eval.auditing.chance import Classes, against_chance, in_words
from msa_eval.auditing.sign import Change, Severity, Sign

Mask = npt.NDArray[np.bool_]


SAME = 1e-5
"""Answers whose drift, as a share of the range of the logits, is below this are the same."""


ALONE = 1e-3
"""The same, where the shape of the batch differs: other kernels add up in another order, in TF32 on some GPUs."""


def clean_at_chance(labels: Classes, predictions: Classes, num_classes: int) -> Sign:
    """Whether a model is no better than chance on clean images, so that nothing can be said of its robustness.

    Args:
        labels: ``(N,)``.
        predictions: the target's on clean batches ``(N,)``.
        num_classes: k.
    """
    found = against_chance(labels, predictions, num_classes)
    seen = f"clean accuracy is {_percent(found.accuracy)}, chance {_percent(found.level)}"
    if found.reached:
        reason = f"{seen}: {in_words(labels, predictions, found)}; no other number says anything about the model"
    else:
        reason = seen
    return Sign("clean_at_chance", found.reached, "unreliable", found.accuracy, found.level, _sentence(reason))


def probabilities(logits: Tensor) -> Sign:
    """Whether clean logits ``(N, k)`` are probabilities: a loss on top is then a double softmax, or saturates."""
    inside = ((logits >= -1e-4) & (logits <= 1 + 1e-4)).all(dim=1) & ((logits.sum(dim=1) - 1).abs() < 1e-3)
    share = float(inside.float().mean())
    fired = share >= 1
    seen = "all outputs are probabilities, on which losses saturate; return the logits before the softmax"
    reason = seen if fired else f"outputs are no probabilities ({_percent(share)} of the rows look like some)"
    return Sign("probabilities", fired, "suspect", share, 1.0, _sentence(reason))


def randomness(other_seeds: Change, *, repeats: bool = True) -> Sign:
    """Whether the target answers at random: alike under one seed, differently under two.

    Args:
        other_seeds: the change between answers under two seeds.
        repeats: whether answers under one seed are alike.
    """
    fired = repeats and other_seeds.drift > SAME
    if not repeats:
        reason = "answers differ even under one seed, so chance can't be told from state (see state)"
    elif fired:
        reason = (
            f"the same batch is answered differently under another seed (drift {other_seeds.drift:.2g} of the logits' "
            f"range, {_percent(other_seeds.flips)} of the classes flip); verdicts need a majority of draws and "
            f"gradients an expectation over them (stochastic.draws, stochastic.eot)"
        )
    else:
        reason = f"the same batch gets the same answer under two seeds (drift {other_seeds.drift:.2g})"
    return Sign("randomness", fired, "note", other_seeds.drift, SAME, _sentence(reason))


def training_mode(left: Sequence[str]) -> Sign:
    """Whether parts of a model in evaluation mode are in training mode: names of what is (see `left_training`)."""
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        reason = (
            f"in training mode: {', '.join(left[:5])}{more}; call .eval() on the whole model, unless the defence means "
            f"it so"
        )
    else:
        reason = "no part of the model is in training mode"
    return Sign("training_mode", bool(left), "note", float(len(left)), 0.0, _sentence(reason))


def optimises_inside(passes: int) -> Sign:
    """Whether a target computes gradients of its own while it answers: so many backward passes on one batch."""
    if passes:
        reason = (
            f"the defence computes gradients while it answers ({passes} backward passes on a batch), which may hide "
            f"what lies behind; give a surrogate that leaves them out, or passes a gradient through them"
        )
    else:
        reason = "the defence computes no gradients while it answers"
    return Sign("optimises_inside", passes > 0, "note", float(passes), 0.0, _sentence(reason))


def batch_dependence(changes: Mapping[str, Change], *, declared: bool, noise: Change | None = None) -> Sign:
    """Whether an image's answer depends on who sits beside it.

    Args:
        changes: by what was done to the batch; empty where there was nobody to sit beside.
        declared: whether the engine takes the target for batch-dependent, and gives every verdict in its batch.
        noise: of a target that answers at random: the change that two seeds make.
    """
    severity: Severity = "note" if declared else "unreliable"
    if not changes:
        reason = "there is only one image, so nothing was learnt about its companions; audit at least two"
        return Sign("batch_dependence", False, severity, 0.0, ALONE, _sentence(reason))
    # Chance gives each row of a changed batch other draws, so only what goes beyond that counts.
    sizes = {name: found.drift if noise is None else found.mean for name, found in changes.items()}
    threshold = ALONE + (0.0 if noise is None else 2 * noise.mean)
    worst = max(sizes, key=lambda name: sizes[name])
    value, found = sizes[worst], changes[worst]
    fired = not value <= threshold
    seen = f"answers change by {value:.2g} of the logits' range, {_percent(found.flips)} of the classes flip ({worst})"
    if fired and declared:
        reason = f"{seen}: these results hold only for the evaluated batches; also evaluate the contexts solo and alone"
    elif fired:
        reason = f"{seen}, though the defence says batch_dependent = False; set it to True and evaluate again"
    else:
        reason = f"an image's answer does not depend on its companions ({seen})"
    return Sign("batch_dependence", fired, severity, value, threshold, _sentence(reason))


def batch_dependence_found(drift: float) -> Sign:
    """Whether a target that was taken to ignore companions answers the points found otherwise with other companions.

    Args:
        drift: by how much, as a share of the logits' range.
    """
    fired = not drift <= ALONE
    seen = f"answers to the points found change by {drift:.2g} of the logits' range with other companions"
    if fired:
        seen += ", though the target was taken to ignore it; set batch_dependent = True and evaluate again"
    return Sign("batch_dependence", fired, "unreliable", drift, ALONE, _sentence(seen))


def state(repeated: Change, after_use: Change, *, other_generators: bool) -> Sign:
    """Whether answers change though inputs and seed are the same.

    Args:
        repeated: the change between two answers in a row.
        after_use: after passes with gradients and of other batches.
        other_generators: whether answers repeat once NumPy's and Python's generators are seeded too: that is chance,
            which can't be made again from a seed of torch, but no state.
    """
    value = max(repeated.drift, after_use.drift)
    fired = not value <= SAME
    severity: Severity = "suspect" if fired and other_generators else "unreliable"
    if not fired:
        reason = f"answers stay the same over passes, with gradients and of other batches (drift {value:.2g})"
    elif other_generators:
        reason = (
            f"answers to the same batch differ by {value:.2g} of the logits' range under the same seed of torch: the "
            f"defence draws from NumPy or random; draw from torch, so that evidence can be made again"
        )
    else:
        flips = max(repeated.flips, after_use.flips)
        reason = (
            f"answers to the same batch under the same seed differ by {value:.2g} of the logits' range "
            f"({_percent(flips)} of the classes flip): the defence keeps a state, or draws from a generator that can't "
            f"be seeded; freeze it, since a verdict depends on what was asked before"
        )
    return Sign("state", fired, severity, value, SAME, _sentence(reason))


def zero_gradients(dead: float, by_surrogate: Mapping[str, float], *, followed: bool = True) -> Sign:
    """Whether gradients vanish through every surrogate.

    Args:
        dead: the share of samples without a gradient through any surrogate under any loss.
        by_surrogate: that share through each alone.
        followed: whether the protocol has attacks that follow gradients; it is a note where none does.
    """
    fired = dead > 0.05
    seen = f"{_percent(dead)} of the samples have no gradient under any loss through any surrogate"
    each = _listed(by_surrogate, _percent)
    if fired and not followed:
        reason = f"{seen} ({each}), and the protocol follows none"
    elif fired:
        reason = f"{seen} ({each}), so white-box attacks can't move them; add a surrogate that is differentiable"
    else:
        reason = f"{seen} ({each})"
    return Sign("zero_gradients", fired, "unreliable" if followed else "note", dead, 0.05, _sentence(reason))


def own_gradient_zero(own: float, dead: float, raised: str = "") -> Sign:
    """Whether only the defence's own gradient vanishes while a surrogate has one.

    Args:
        own: the share of samples without a gradient through the defence's own decision.
        dead: the share without one through any surrogate.
        raised: what a pass of its own decision with a gradient raises.
    """
    fired = own > 0.05 >= dead
    reason = f"{_percent(own)} of the samples have no gradient through the defence's own decision{raised}"
    if fired:
        reason += "; a surrogate has one, so the figure rests on surrogates and gradient-free attacks"
    return Sign("own_gradient_zero", fired, "note", own, 0.05, _sentence(reason))


def gradient_free_beats_white_box(only: int, n: int, *, continued: bool = False) -> Sign:
    """Whether gradient-free attacks break what no white-box attack breaks, which gradients should make easy.

    Args:
        only: samples that only gradient-free attacks broke.
        n: all samples.
        continued: whether those attacks went on from white-box points, where a last touch is no wonder.

    >>> gradient_free_beats_white_box(4, 100).severity, gradient_free_beats_white_box(1, 10).fired
    ('suspect', False)
    """
    share = only / n
    severity: Severity = "note" if continued else "unreliable" if share > 0.05 else "suspect"
    fired = share > 0.01 and only >= 2
    seen = f"only gradient-free attacks broke {only} of {n} samples ({_percent(share)})"
    if fired and continued:
        reason = f"{seen}, from points that white-box attacks had found; more white-box steps may find them too"
    elif fired:
        reason = f"{seen}: gradients mislead; add surrogates, losses or restarts, and more queries"
    else:
        reason = seen
    return Sign("gradient_free_beats_white_box", fired, severity, share, 0.01, _sentence(reason))


NO_TRANSFER = "No transfer was tried: the target has no second surrogate."


def transfer_beats_direct(direct: Mask, transfers: Mapping[str, Mask]) -> Sign:
    """Whether points found through another surrogate break more than the direct attack through ``ste``.

    Tested by McNemar's exact test, its level 0.05 shared among the surrogates.

    Args:
        direct: the samples that the direct attack broke ``(N,)``.
        transfers: those that each other surrogate's broke.

    Returns:
        the sign, which says so where there is no other surrogate to transfer from.
    """
    if not transfers:
        return Sign("transfer_beats_direct", False, "suspect", 0.0, 0.05, NO_TRANSFER)
    from scipy.stats import binomtest  # takes more than a second to import

    worst = max(transfers, key=lambda name: int(transfers[name].sum()))
    gain, loss = int((transfers[worst] & ~direct).sum()), int((direct & ~transfers[worst]).sum())
    lead = (gain - loss) / len(direct)
    chance = binomtest(gain, gain + loss, alternative="greater").pvalue if gain + loss else 1.0
    fired = lead > 0.05 and chance < 0.05 / len(transfers)
    size = f"{100 * abs(lead):.1f} points {'more' if lead > 0 else 'less'}"
    seen = f"points found through {worst} break {size} than the direct attack (ste)"
    reason = f"{seen}, p = {chance:.2g}"
    if fired:
        reason += ": the defence's own gradient misleads; take the surrogates' figures, and look for more of them"
    return Sign("transfer_beats_direct", fired, "suspect", lead, 0.05, _sentence(reason))


def large_eps(left: int, n: int, ball: str, *, failure: str = "") -> Sign:
    """Whether samples survive white-box attacks in a ball in which every image can be erased.

    Args:
        left: samples that no attack broke.
        n: all samples.
        ball: the ball in words.
        failure: what went wrong, where the attacks could not be finished.
    """
    share = left / n
    fired = bool(failure) or (share > 0.05 and left >= min(2, n))
    seen = f"{_percent(share)} of the samples survive in a ball of {ball}, in which every image can be erased"
    if failure:
        reason = f"the attack in a ball of {ball} failed ({failure}); make the defence answer to any image in [0, 1]"
    elif fired:
        reason = f"{seen}: the attacks can't find what must be there; add surrogates, or look for masked gradients"
    else:
        reason = seen
    return Sign("large_eps", fired, "unreliable", share, 0.05, _sentence(reason))


def one_step_beats_forty(one: Mapping[str, int], forty: Mapping[str, int], n: int) -> Sign:
    """Whether a single step through some surrogate breaks more samples than forty through any.

    That forty steps through one of them break less than one does is no fault where another leads further.
    """
    first, last = (max(broken, key=lambda name: broken[name]) for broken in (one, forty))
    lead = one[first] - forty[last]
    fired = lead > 2 and lead / n > 0.02
    reason = (
        f"a single step (through {first}) breaks {one[first]} of {n} samples, forty steps (through {last}) "
        f"{forty[last]}"
    )
    if fired:
        reason += ": the gradient leads astray away from clean images; add restarts, losses and surrogates"
    return Sign("one_step", fired, "suspect", lead / n, 0.02, _sentence(reason))


def loss_not_rising(rises: Mapping[str, float]) -> Sign:
    """Whether forty steps raise the loss through no surrogate.

    Args:
        rises: for each surrogate, the rise of the mean loss from the random start to the last quarter of the run, in
            units of the mean change that the random start itself made: that makes it free of scale and of ε.
    """
    best = max(rises.values())
    fired = not best > 0.5
    each = _listed(rises, lambda rise: f"{rise:.2g}")
    reason = f"forty steps raise the loss by {best:.2g} times what a random start changes ({each})"
    if fired:
        reason += ": the search finds no way up; look for masked gradients, and raise steps and restarts"
    return Sign("loss_not_rising", fired, "suspect", best, 0.5, _sentence(reason))


def surrogate_disagrees(rates: Mapping[str, float]) -> Sign:
    """Whether even the best surrogate answers differently from the target on clean images.

    Args:
        rates: for each surrogate, the share of clean samples on which its class differs from the target's.
    """
    best = min(rates.values())
    fired = best > 0.05
    reason = (
        f"the best surrogate differs from the target on {_percent(best)} of the clean samples "
        f"({_listed(rates, _percent)})"
    )
    if fired:
        reason += ", so what fools it need not fool the target; add a surrogate that is closer"
    return Sign("surrogate_disagrees", fired, "suspect", best, 0.05, _sentence(reason))


def unconfirmed_breaks(unconfirmed: int, broken: int, *, left_out: int = 0) -> Sign:
    """Whether broken samples have no proof that breaks them again: such results do not verify.

    Args:
        unconfirmed: samples that no replay of their adversarial batch broke.
        broken: all that count as broken.
        left_out: samples whose proofs found no room in the archive.
    """
    missing = unconfirmed + left_out
    share = missing / max(broken, 1)
    if missing:
        why = [f"{unconfirmed} could not be broken again by their own adversarial batches"] if unconfirmed else []
        why += [f"{left_out} are left out of the archive for its size"] if left_out else []
        reason = (
            f"of {broken} broken samples {' and '.join(why)}, so these results do not verify; the defence may keep a "
            f"state, draw at random, or look at its batch unnoticed"
        )
    else:
        reason = f"all {broken} broken samples were broken again by their own adversarial batches"
    severity: Severity = "unreliable" if unconfirmed / max(broken, 1) > 0.05 else "suspect"
    return Sign("unconfirmed_breaks", missing > 0, severity, share, 0.0, _sentence(reason))


def state_guard(changes: Sequence[str]) -> Sign:
    """Whether a defence is not as it was before: names of what changed."""
    fired = bool(changes)
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    if fired:
        reason = (
            f"the defence is not as it was before: {', '.join(changes[:5])}{more} changed, so verdicts depend on what "
            f"was asked before; freeze it for the evaluation"
        )
    else:
        reason = "parameters, buffers, modes and the answer to a clean batch are as they were before"
    return Sign("state_guard", fired, "unreliable", float(len(changes)), 0.0, _sentence(reason))


def _listed(values: Mapping[str, float], show: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in values.items()) or "no surrogate"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
