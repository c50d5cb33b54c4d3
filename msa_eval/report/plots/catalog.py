"""The figures: each drawn from its table (`msa_eval.report.frames`), described in words, and listed with its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from msa_eval.evidence.results import Results
from msa_eval.report import frames
from msa_eval.report.plots.agreement import draw_agreement, tell_agreement
from msa_eval.report.plots.batches import draw_batches, tell_batches
from msa_eval.report.plots.classes import draw_classes, tell_classes
from msa_eval.report.plots.spending import draw_spending, tell_spending
from msa_eval.report.plots.transfer import draw_transfer, tell_transfer
from msa_eval.report.plots.waterfall import draw_waterfall, tell_waterfall


@dataclass(frozen=True)
class Chart:
    """A figure with all that stands around it.

    Attributes:
        name: of its files, such as ``waterfall-joint``.
        kind: ``waterfall``, ``transfer``, ``spending``, ``classes``, ``agreement`` or ``batches``.
        context: what the attacker controls.
        title: in a few words.
        caption: how to read it.
        alt: what it shows, for those who can't see it.
        data: what it shows, as a table.
        draw: the figure.
    """

    name: str
    kind: str
    context: str
    title: str
    caption: str
    alt: str
    data: pd.DataFrame
    draw: Callable[[pd.DataFrame], Figure]

    def figure(self) -> Figure:
        """Draw it."""
        return self.draw(self.data)


class Kind(NamedTuple):
    """A kind of figure.

    Attributes:
        name: of its section and files.
        title: in a few words.
        caption: how to read it.
        needs: tables without which there is none.
        frame: what it shows.
        draw: the figure of that.
        tell: it in words.
    """

    name: str
    title: str
    caption: str
    needs: tuple[str, ...]
    frame: Callable[[Results, str], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]
    tell: Callable[[pd.DataFrame], str]

    def chart(self, results: Results, context: str) -> Chart | str:
        """The figure of an evaluation in a context, or a clause why there is none."""
        if lacking := frames.lacking(results, context, *self.needs):
            return lacking
        data = self.frame(results, context)
        if data.empty:
            return "all runs search among points of other runs"
        return Chart(
            f"{self.name}-{context}", self.name, context, self.title, self.caption, self.tell(data), data, self.draw
        )


def charts(results: Results) -> Iterator[Chart]:
    """All figures of an evaluation, in the page's order: one kind after another, in every context."""
    for kind in KINDS:
        for context in frames.contexts_of(results):
            made = kind.chart(results, context)
            if isinstance(made, Chart):
                yield made


KINDS = (
    Kind(
        "waterfall", "From clean to worst case",
        "Each run removes the samples that it is the first to break. What is left is the worst case.",
        ("attacks",), frames.waterfall, draw_waterfall, tell_waterfall,
    ),
    Kind(
        "transfer", "Surrogate × loss",
        "Large: accuracy of the target in % on the points of highest surrogate loss (a run's final), of the restart "
        "where it is lowest. Small: accuracy of the surrogate on the same points, those wrong when clean "
        "included. Where the target is well above its surrogate, the points do not transfer. In a cascade a run "
        "starts from the best points so far, so its final includes what earlier runs broke. Recombination, pursuit, "
        "composition and overtime search among points of several runs and are left out.",
        ("attacks",), frames.transfer, draw_transfer, tell_transfer,
    ),
    Kind(
        "spending", "Worst case against passes",
        "A pass is one image through the trunk. A curve that still falls at its end says that more passes would break "
        "more.",
        ("attacks", "outcomes"), frames.budget, draw_spending, tell_spending,
    ),
    Kind(
        "classes", "Class by class", "Bars are Wilson 95 % intervals of the worst case.",
        (), frames.per_class, draw_classes, tell_classes,
    ),
    Kind(
        "agreement", "Agreement between runs",
        "Of the samples right on their clean batch: how many each run broke itself at some iterate, and how many of "
        "them no other run broke. Where a run starts from the best points so far, as in a cascade, what had fallen "
        "before and is wrong at its start (iterate 0) does not count as broken by it.",
        ("attacks", "outcomes"), frames.agreement, draw_agreement, tell_agreement,
    ),
    Kind(
        "batches", "Batch by batch", "Every verdict is given in the batch of the plan.",
        (), frames.seating, draw_batches, tell_batches,
    ),
)  # fmt: skip
