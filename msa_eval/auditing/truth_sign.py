"""What the truth of gradients means for a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msa_eval.auditing.sign import Severity, Sign

TRUE_ENOUGH, IN_COMPANY, MISLEADING = 0.75, 0.6, 0.4
"""Below the first figure no gradient is true enough to rely on, below the second none of a target that looks at its
batch, and below the third all of them mislead."""

OF_ITS_OWN, CLEARLY = 0.9, 0.03
"""What the plain gradient of a target that decides rows apart has to reach, where its author brings no surrogate; a
difference of figures that is no chance."""

LEAST_SIGNAL, AGREEMENT = 0.1, 0.9
"""What is too little to predict; how often a surrogate has to agree with the target then."""


def limit_of(interacting: bool) -> float:
    """Below which figure a gradient is not true enough."""
    return IN_COMPANY if interacting else TRUE_ENOUGH


def gradient_truth(
    own: Mapping[str, float],
    *,
    signal: float,
    agreement: float,
    found: Mapping[str, float] | None = None,
    brought: bool = False,
    interacting: bool = False,
    unreached: bool = False,
    tried: Sequence[str] = (),
    failure: str = "",
) -> Sign:
    """Whether a figure rests on a gradient that does not predict the hard target, or on none that is the target's own.

    Where a surrogate made of the target's code breaks more than the target's own gradient, the best one is known to
    nobody but the author: the figure is an upper bound, and not called sound until a surrogate is brought.

    Args:
        own: how true the gradient of each surrogate of the target's own is, from -1 to 1; empty where none has one.
        signal: the share of the target's changes that a gradient could predict.
        agreement: where that is too little to tell: the share of the points of a search that the best surrogate with
            values of its own takes for right or wrong as the target does.
        found: the same of the surrogates that were found, and are used.
        brought: whether the author brings surrogates beside the plain gradient.
        interacting: whether samples of a batch change each other's margins, which blurs the figures.
        unreached: whether companions change answers, and no gradient of the target's own reaches them.
        tried: surrogates that were made of the target's own code, and tried.
        failure: what went wrong, where it could not be measured.

    >>> gradient_truth({"ste": 0.99}, signal=0.96, agreement=1.0).fired
    False
    >>> gradient_truth({"ste": 0.6}, found={"inner:net": 0.2}, signal=0.9, agreement=1.0).severity
    'suspect'
    """
    found = found or {}
    figures = {**own, **found}
    best, held = (max(values.values(), default=0.0) for values in (figures, own))
    name = max(figures, key=lambda one: figures[one], default="none")
    coarse = signal < LEAST_SIGNAL and agreement >= AGREEMENT
    limit = limit_of(interacting)
    untrue = best < limit and not coarse
    needed = limit if brought or interacting else OF_ITS_OWN
    rests = bool(found) and (held < needed or max(found.values()) > held + CLEARLY)
    fired = bool(failure) or untrue or rests or unreached or (held < needed and not coarse)
    severity: Severity = "unreliable" if best < MISLEADING and signal >= LEAST_SIGNAL and not failure else "suspect"
    each = ", ".join(f"{one} {figure:.2f}" for one, figure in figures.items()) or "no surrogate"
    seen = f"the truest gradient ({name}) predicts the hard target's changes with {best:.2f} of 1 ({each})"
    if signal < LEAST_SIGNAL:
        seen += (
            f"; the target answers in steps so coarse that little can be predicted, and the best surrogate with values "
            f"of its own takes {100 * agreement:.1f} % of the points for right or wrong as it does"
        )
    if tried:
        seen += f"; tried besides: {', '.join(tried)}"
    if failure:
        seen = f"how true gradients are could not be measured ({failure}); bring a surrogate"
    elif untrue:
        seen += ": what gradients can't find may be there; bring a surrogate, or believe gradient-free attacks alone"
    elif rests:
        seen += (
            f": the target's own gradient is masked, and the figure rests on surrogates that were found "
            f"({', '.join(found)}); it is an upper bound until you bring one that passes a true gradient"
        )
    elif unreached:
        seen += (
            ": companions change an answer, and no gradient of the target's own reaches them; bring a surrogate "
            "that passes one to the whole batch"
        )
    elif fired:
        seen += f", below the {needed} of a gradient that nothing masks; bring a surrogate that passes a true one"
    return Sign("gradient_truth", fired, severity, held if rests else best, needed, seen[0].upper() + seen[1:] + ".")
