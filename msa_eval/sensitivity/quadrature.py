"""Gauss-Legendre quadrature on panels: many integrals at once, to nearly full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@lru_cache
def _rule(n: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return nodes, weights


@lru_cache
def _graded_rule(n: int, panels: int) -> tuple[Array, Array]:
    """Nodes and weights on [0, 1], in panels that shrink by 4 towards both ends."""
    half = np.concatenate([[0.0], 0.5 * 4.0 ** np.arange(1 - panels, 1)])
    edges = np.concatenate([half, 1 - half[-2::-1]])
    nodes, weights = _rule(n)
    width = np.diff(edges)[:, None]
    return (edges[:-1, None] + width * (nodes + 1) / 2).ravel(), (width * weights / 2).ravel()


def graded(low: Array, high: Array, *, n: int = 20, panels: int = 12) -> tuple[Array, Array]:
    """Nodes and weights on intervals with what may be a root or a corner at either end.

    Args:
        low: lower ends, of any shape.
        high: upper ends, not below the lower ones.
        n: nodes a panel.
        panels: on each half of the interval, each a quarter as wide as the next.

    Returns:
        nodes and weights ``(M, *shape)``: ``(weights * f(nodes)).sum(0)`` is the integral.

    >>> nodes, weights = graded(np.array(0.0), np.array(1.0))
    >>> round(float((weights * np.sqrt(nodes)).sum()), 10)
    0.6666666667
    """
    low, high = np.broadcast_arrays(low, high)
    nodes, weights = (v.reshape(-1, *[1] * low.ndim) for v in _graded_rule(n, panels))
    return low + (high - low) * nodes, (high - low) * weights


def adaptive(integrand: Callable[[Array, Any], Array], edges: Array, *, tolerance: float = 1e-13) -> Array:
    """Many integrals at once, each on panels that are halved where halves disagree with the whole.

    Args:
        integrand: takes points ``(n, P)`` and the number of the integral ``(P,)`` they belong to.
        edges: of the first panels of each integral ``(E, M)``, ascending; they should tell spikes apart from the rest,
            because what falls between all nodes is not seen.
        tolerance: absolute, of each panel's disagreement.

    Returns:
        the integrals ``(M,)``.

    >>> adaptive(lambda x, which: np.abs(x - 0.3), np.array([[0.0], [1.0]])).round(12)
    array([0.29])
    """
    count = edges.shape[1]
    low, high = edges[:-1].ravel(), edges[1:].ravel()
    which = np.broadcast_to(np.arange(count), (len(edges) - 1, count)).ravel()
    keep = high > low
    low, high, which = low[keep], high[keep], which[keep]
    nodes, weights = _rule(15)
    nodes, weights = (nodes[:, None] + 1) / 2, weights[:, None] / 2

    def panels(low: Array, high: Array, which: npt.NDArray[np.intp]) -> Array:
        width = high - low
        found: Array = (weights * integrand(low + width * nodes, which)).sum(axis=0) * width
        return found

    total = np.zeros(count)
    whole = panels(low, high, which)
    while len(low):
        middle = (low + high) / 2
        left, right = panels(low, middle, which), panels(middle, high, which)
        # A panel as narrow as the spacing of floats can't be halved.
        done = (np.abs(left + right - whole) <= tolerance) | (middle <= low) | (middle >= high)
        np.add.at(total, which[done], (left + right)[done])
        again = ~done
        low, high = np.concatenate([low[again], middle[again]]), np.concatenate([middle[again], high[again]])
        which, whole = np.tile(which[again], 2), np.concatenate([left[again], right[again]])
    return total
