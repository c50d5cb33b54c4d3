"""Whether a model is any better on clean images than one that has not seen them, and what may be wrong if it is not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from msa_eval.evidence.metrics import rate

Classes = npt.NDArray[np.integer]

LIKE, GAIN = 0.6, 0.3
"""Predictions are the labels in another order when so large a share is right in it, and so much more than as it is."""

ENOUGH, ALIKE = 8, 0.95
"""Of at least so many images, a model that gives so large a share one answer is compared with a label's share."""

EACH = 3
"""Images of a class, on average, without which any predictions look like labels in some order."""


class Chance(NamedTuple):
    """How clean predictions stand to chance.

    Attributes:
        accuracy: the share that is right.
        level: what a model reaches that never looks: 1 in k, or the share of the most frequent label where the model
            gives nearly always the same answer.
        reached: whether the model is no better, as far as so many images tell.
        order: of predictions that are the labels in another order: the prediction for each label; empty otherwise.
        ordered: the share that would be right in that order.
    """

    accuracy: float
    level: float
    reached: bool
    order: dict[int, int]
    ordered: float


def against_chance(labels: Classes, predictions: Classes, num_classes: int) -> Chance:
    """Hold clean predictions ``(N,)`` against chance.

    The Wilson interval of the accuracy must reach the level of chance, and the accuracy lie closer to it than to 1: a
    few images that are all right say nothing against a model.

    >>> y = np.arange(40) % 10
    >>> against_chance(y, y, 10).reached, against_chance(y, (y + 1) % 10, 10).reached
    (False, True)
    >>> against_chance(y[:2], y[:2], 10).reached
    False
    """
    right = rate(int((labels == predictions).sum()), len(labels))
    level = max(1 / num_classes, _by_one_answer(labels, predictions))
    order, ordered = _order(labels, predictions)
    other = bool(order) and ordered >= LIKE and ordered - right.value >= GAIN
    reached = right.low <= level and right.value < (1 + level) / 2
    return Chance(right.value, level, reached or other, order if other else {}, ordered)


def in_words(labels: Classes, predictions: Classes, found: Chance) -> str:
    """What labels and predictions there are, and what that hints at."""
    seen = f"labels {ranges(labels)}, predictions {ranges(predictions)}"
    if found.order:
        shifts = {there - label for label, there in found.order.items()}
        how = f"the label {shifts.pop():+d}" if len(shifts) == 1 else f"another class each ({_pairs(found.order)})"
        return f"{seen}; {100 * found.ordered:.0f} % of the predictions are {how}: check the class order"
    if not set(labels.tolist()) & set(predictions.tolist()):
        return f"{seen}: check the class order"
    if len(set(predictions.tolist())) == 1:
        return f"{seen}, always the same one: check that the weights are loaded, and the images' normalisation"
    return f"{seen}: check that the weights are loaded, the class order, and the images' normalisation"


def ranges(classes: Classes) -> str:
    """The classes that occur, in short.

    >>> ranges(np.array([0, 1, 2, 2, 7, 9, 10]))
    '0-2, 7, 9-10'
    """
    there = sorted(set(classes.tolist()))
    runs: list[list[int]] = []
    for one in there:
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")


def _by_one_answer(labels: Classes, predictions: Classes) -> float:
    """The share of the most frequent label, for a model that gives nearly always the same answer; 0 for others."""
    counts, answers = (np.unique(classes, return_counts=True)[1] for classes in (labels, predictions))
    if len(counts) < 2 or len(labels) < ENOUGH or answers.max() < ALIKE * len(labels):
        return 0.0
    return float(counts.max() / len(labels))


def _order(labels: Classes, predictions: Classes) -> tuple[dict[int, int], float]:
    """The classes in the order in which most predictions are right, and the share that is."""
    from scipy.optimize import linear_sum_assignment  # takes long to import

    here, row = np.unique(labels, return_inverse=True)
    there, column = np.unique(predictions, return_inverse=True)
    if len(labels) < EACH * len(here) or len(here) < 2:
        return {}, 0.0
    table = np.zeros((len(here), len(there)))
    np.add.at(table, (row, column), 1)
    rows, columns = linear_sum_assignment(-table)
    pairs = {int(here[i]): int(there[j]) for i, j in zip(rows, columns, strict=True) if table[i, j]}
    return pairs, float(table[rows, columns].sum() / len(labels))


def _pairs(order: dict[int, int]) -> str:
    shown = [f"{label} is called {there}" for label, there in order.items() if label != there]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
