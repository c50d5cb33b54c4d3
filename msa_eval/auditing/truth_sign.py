"""What the truth of gradients means for a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msa_eval.auditing.sign import Severity, Sign

TRUE_ENOUGH, IN_COMPANY, MISLEADING = 0.75, 0.6, 0.4
"""Below the first figure no gradient is true enough to rely on, below the second none of a target that looks at its
batch, and below the third all of them mislead."""

LEAST_SIGNAL, AGREEMENT = 0.1, 0.9
"""What is too little to predict; how often a surrogate has to agree with the target then."""


def limit_of(interacting: bool) -> float:
    """Below which figure a gradient is not true enough."""
    return IN_COMPANY if interacting else TRUE_ENOUGH


def gradient_truth(
    figures: Mapping[str, float],
    *,
    signal: float,
    agreement: float,
    interacting: bool = False,
    tried: Sequence[str] = (),
    failure: str = "",
) -> Sign:
    """Whether no surrogate's gradient predicts what the hard target does at steps of the size that attacks take.

    Args:
        figures: how true the gradient of each surrogate is, from -1 to 1; empty where none has one.
        signal: the share of the target's changes that a gradient could predict.
        agreement: where that is too little to tell: the share of the points of a search that the best surrogate with
            values of its own takes for right or wrong as the target does.
        interacting: whether samples of a batch change each other's margins, which blurs the figures.
        tried: surrogates that were made of the target's own code, and tried.
        failure: what went wrong, where it could not be measured.

    >>> gradient_truth({"ste": 0.99}, signal=0.96, agreement=1.0).fired
    False
    >>> gradient_truth({"ste": 0.6, "inner:net": 0.2}, signal=0.9, agreement=1.0).severity
    'suspect'
    """
    best = max(figures.values(), default=0.0)
    name = max(figures, key=lambda one: figures[one], default="none")
    no_figure = failure or (signal < LEAST_SIGNAL and agreement >= AGREEMENT)
    limit = limit_of(interacting)
    fired = best < limit and not no_figure
    severity: Severity = "unreliable" if best < MISLEADING and signal >= LEAST_SIGNAL else "suspect"
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
        seen = f"how true gradients are could not be measured ({failure})"
    if fired:
        seen += ": what gradients can't find may be there; bring a surrogate, or believe gradient-free attacks alone"
    return Sign("gradient_truth", fired, severity, best, limit, seen[0].upper() + seen[1:] + ".")
