"""The figures: each drawn from its table (`msa_eval.report.frames`), told in words, and listed with its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from msa_eval.evidence.gallery import Exhibit
from msa_eval.evidence.results import Results
from msa_eval.report import frames
from msa_eval.report.style import COLOURS, COLUMN, DASHES, GRID, INK, NAMES, PAGE, PALETTE, SEQUENTIAL, paper_style

FEW_CLASSES = 20
"""Up to so many classes have a row each; more are drawn as a curve."""

FEW_BATCHES = 200
"""Up to so many batches are drawn one by one; more as a curve."""


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
            return "all runs search among points of others"
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


def percent(value: float) -> str:
    """A share in percent.

    >>> percent(0.0519), percent(float("nan"))
    ('5.2', 'undefined')
    """
    return "undefined" if math.isnan(value) else f"{100 * value:.1f}"


def label(name: object, longest: int = 36) -> str:
    r"""A name as it stands in a figure: not too long, and no formula.

    >>> label("soft-hybrid:apgd-margin:0"), label("x" * 50, 9)
    ('soft-hybrid:apgd-margin:0', 'xxxx…xxxx')
    >>> print(label("$x$"))
    \$x\$
    """
    text = " ".join(str(name).split())
    if len(text) > longest:
        text = f"{text[: longest // 2]}\N{HORIZONTAL ELLIPSIS}{text[-((longest - 1) // 2) :]}"
    return text.replace("$", r"\$")


def draw_waterfall(data: pd.DataFrame) -> Figure:
    """Clean, what each run newly broke, and the worst case; runs that broke nothing new are folded together."""
    parts = {str(target): _folded(rows) for target, rows in data.groupby("target", sort=False)}
    with paper_style():
        figure, panels = _panels([len(steps) for steps in parts.values()], row=0.16)
        for axes, (target, steps) in zip(panels, parts.items(), strict=True):
            for place, (name, before, after, broken) in enumerate(steps):
                _waterfall_bar(axes, place, name, (before, after), broken, COLOURS[target])
            axes.set_yticks(range(len(steps)), [label(name) for name, *_ in steps])
            axes.set_title(NAMES[target], loc="left", color=COLOURS[target], fontweight="bold")
            _percent_axis(axes)
        panels[-1].set_xlabel("accuracy in %")
    return figure


def _waterfall_bar(axes: Axes, place: int, name: str, levels: tuple[float, float], broken: int, colour: str) -> None:
    before, after = levels
    total = name in ("clean", "worst case")
    if total:
        axes.barh(place, after, height=0.7, color=colour)
        axes.text(_or_zero(after) + 0.01, place, percent(after), va="center", fontsize=6, fontweight="bold")
        return
    axes.barh(place, before - after, left=after, height=0.7, color=colour, alpha=0.45, linewidth=0)
    axes.plot([after, after], [place - 0.35, place + 0.65], color=INK, linewidth=0.5)
    if broken:
        axes.text(_or_zero(before) + 0.01, place, f"\N{MINUS SIGN}{broken}", va="center", fontsize=6)


def _folded(rows: pd.DataFrame) -> list[tuple[str, float, float, int]]:
    """The steps to draw: neighbouring runs that broke nothing new become one."""
    steps: list[tuple[str, float, float, int]] = []
    idle = 0
    for row in rows.to_dict(orient="records"):
        if row["step"] in ("clean", "worst_case") or row["broken"]:
            name = "worst case" if row["step"] == "worst_case" else str(row["step"])
            steps.append((name, row["before"], row["after"], row["broken"]))
            idle = 0
            continue
        idle += 1
        if idle > 1:
            steps.pop()
        name = str(row["step"]) if idle == 1 else f"{idle} runs that broke no more"
        steps.append((name, row["before"], row["after"], 0))
    return steps


def tell_waterfall(data: pd.DataFrame) -> str:
    """The waterfall in words."""
    told = []
    for target, rows in data.groupby("target", sort=False):
        first, *runs, last = rows.to_dict(orient="records")
        steps = [f"{row['step']} breaks {row['broken']} more" for row in runs if row["broken"]]
        told.append(
            f"{NAMES[str(target)]}: clean {percent(first['after'])} %, {', '.join(steps) or 'no run breaks a sample'}, "
            f"worst case {percent(last['after'])} %"
        )
    return "; ".join(told) + "."


def draw_transfer(data: pd.DataFrame) -> Figure:
    """The surrogate × loss matrix: the target's accuracy (large) over the surrogate's (small)."""
    parts = [(str(target), rows) for target, rows in data.groupby("target", sort=False)]
    losses = list(dict.fromkeys(_loss(row) for row in data.to_dict(orient="records")))
    with paper_style():
        rows_of = [rows["surrogate"].nunique() for _, rows in parts]
        figure, panels = _panels(rows_of, row=0.27, top=0.9)
        for place, (axes, (target, rows)) in enumerate(zip(panels, parts, strict=True)):
            surrogates = list(dict.fromkeys(rows["surrogate"]))
            for row in rows.to_dict(orient="records"):
                _transfer_cell(axes, losses.index(_loss(row)), surrogates.index(row["surrogate"]), row)
            axes.set_xlim(-0.5, len(losses) - 0.5)
            axes.set_ylim(len(surrogates) - 0.5, -0.5)
            axes.set_yticks(range(len(surrogates)), [label(name, 24) for name in surrogates])
            axes.set_xticks(
                range(len(losses)),
                [label(name, 24) for name in losses],
                rotation=30,
                ha="right",
                rotation_mode="anchor",
            )
            axes.tick_params(length=0, labelbottom=place == len(parts) - 1)
            axes.spines[:].set_visible(False)
            axes.set_title(NAMES[target], loc="left", color=COLOURS[target], fontweight="bold")
    return figure


def _transfer_cell(axes: Axes, x: int, y: int, row: Mapping[Hashable, Any]) -> None:
    value = row["target_accuracy"]
    shade = mpl.colormaps[SEQUENTIAL](_or_zero(value))
    ink = "#000000" if 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] > 0.5 else "#ffffff"
    axes.add_patch(mpl.patches.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=shade, linewidth=0))
    axes.text(x, y - 0.13, percent(value), ha="center", va="center", color=ink, fontsize=6.5, fontweight="bold")
    axes.text(x, y + 0.26, percent(row["surrogate_accuracy"]), ha="center", va="center", color=ink, fontsize=5)


def _loss(row: Mapping[Hashable, Any]) -> str:
    return f"{row['attack']}, {row['loss']}"


def tell_transfer(data: pd.DataFrame) -> str:
    """The matrix in words."""
    told = [
        f"{NAMES[row['target']]}, {row['surrogate']} with {_loss(row)}: target {percent(row['target_accuracy'])} %, "
        f"surrogate {percent(row['surrogate_accuracy'])} %"
        for row in data.to_dict(orient="records")
    ]
    return "; ".join(told) + "."


def draw_spending(data: pd.DataFrame) -> Figure:
    """Worst case against passes, a step curve a target."""
    curves = {str(target): rows for target, rows in data.groupby("target", sort=False)}
    with paper_style():
        figure = Figure(figsize=(COLUMN, 2.2), layout="constrained")
        axes = figure.subplots()
        _draw_curves(axes, curves, {target: COLOURS[target] for target in curves})
        axes.legend([NAMES[target] for target in curves])
    return figure


def draw_curves(curves: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Curves of worst case against passes of many contenders, named beside their ends, at page width.

    Args:
        curves: by name, each with ``passes`` and ``worst_case`` in order of passes.
        title: above the chart.
    """
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(curves)}
    with paper_style():
        figure = Figure(figsize=(PAGE, 4), layout="constrained")
        axes = figure.subplots()
        _draw_curves(axes, curves, colours, least=5)
        axes.set_title(title, loc="left")
        ends = sorted((float(curve["worst_case"].iloc[-1]), name) for name, curve in curves.items())
        place = -math.inf
        for value, name in ends:
            place = max(place + 0.04, value)
            axes.text(
                1.02, place, f"{label(name)} {percent(value)}", transform=axes.get_yaxis_transform(), va="center",
                color=colours[name], fontsize=6.5,
            )  # fmt: skip
    return figure


def _draw_curves(
    axes: Axes, curves: Mapping[str, pd.DataFrame], colours: Mapping[str, str], *, least: float = 1
) -> None:
    """Step curves on a logarithmic axis of passes, which starts at the least."""
    for number, (name, curve) in enumerate(curves.items()):
        dash = DASHES[number // len(PALETTE) % len(DASHES)] if len(curves) > 2 else DASHES[number]
        axes.step(
            curve["passes"].clip(lower=least), curve["worst_case"], where="post", color=colours[name], linestyle=dash
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "20", "40", "60", "80", "100"])
    axes.grid(axis="y")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("passes a sample (logarithmic)")
    axes.set_ylabel("worst case in %")


def tell_spending(data: pd.DataFrame) -> str:
    """The curves in words."""
    told = []
    for target, rows in data.groupby("target", sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        half = rows[rows["worst_case"] <= (first["worst_case"] + last["worst_case"]) / 2]
        halfway = f", half of the fall by {half['passes'].iloc[0]:.0f} passes" if len(half) else ""
        told.append(
            f"{NAMES[str(target)]}: from {percent(first['worst_case'])} % to {percent(last['worst_case'])} % after "
            f"{last['passes']:.0f} passes a sample{halfway}"
        )
    return "; ".join(told) + "."


def draw_classes(data: pd.DataFrame) -> Figure:
    """Clean (hollow) and worst case (filled, with its interval) of each class; of many classes, in order of it."""
    targets = list(dict.fromkeys(data["target"]))
    labels = sorted(data["label"].unique())
    few = len(labels) <= FEW_CLASSES
    with paper_style():
        height = 0.7 + 0.2 * len(labels) if few else 2.2
        figure = Figure(figsize=(COLUMN, height), layout="constrained")
        axes = figure.subplots()
        for number, target in enumerate(targets):
            rows = data[data["target"] == target]
            (_draw_dumbbells if few else _draw_ranked)(axes, rows, number, COLOURS[target], NAMES[target])
        _percent_axis(axes, across=few)
        if few:
            axes.set_yticks(range(len(labels)), [label(name, 16) for name in labels])
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_ylabel("class")
            axes.set_xlabel("accuracy in % (hollow: clean, filled: worst case)")
        else:
            axes.set_xlabel("classes, in order of their accuracy")
            axes.set_ylabel("accuracy in % (dashed: clean)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.25 / height), ncols=2, borderaxespad=0)
    return figure


def _draw_dumbbells(axes: Axes, rows: pd.DataFrame, number: int, colour: str, name: str) -> None:
    labels = sorted(rows["label"])
    y = [labels.index(one) + (number - 0.5) * 0.36 for one in rows["label"]]
    axes.hlines(y, rows["worst_case_low"], rows["worst_case_high"], color=colour, linewidth=0.7)
    axes.plot(rows["worst_case"], y, "os"[number], color=colour, markersize=3.5, label=name)
    axes.plot(rows["clean"], y, "os"[number], color=colour, markersize=3.5, markerfacecolor="none", markeredgewidth=0.7)


def _draw_ranked(axes: Axes, rows: pd.DataFrame, number: int, colour: str, name: str) -> None:
    for metric, dash in (("clean", "--"), ("worst_case", "-")):
        values = rows[metric].sort_values().reset_index(drop=True)
        told = name if metric == "worst_case" else None
        axes.plot(values.index + 1, values, dash, color=colour, linewidth=1.2 - 0.3 * number, label=told)


def tell_classes(data: pd.DataFrame) -> str:
    """The classes in words: all of a few, the ends of many."""
    told = []
    for target, rows in data.groupby("target", sort=False):
        ranked = rows.sort_values("worst_case", kind="stable")
        if len(rows) > FEW_CLASSES:
            ranked = pd.concat([ranked.head(3), ranked.tail(3)])
        each = [
            f"class {row['label']} clean {percent(row['clean'])} %, worst case {percent(row['worst_case'])} %"
            for row in ranked.to_dict(orient="records")
        ]
        told.append(f"{NAMES[str(target)]}, from the weakest: {'; '.join(each)}")
    return ". ".join(told) + "."


def draw_agreement(data: pd.DataFrame) -> Figure:
    """How many samples each run broke, and how many of them no other run did."""
    parts = [(str(target), rows) for target, rows in data.groupby("target", sort=False)]
    most = max(int(data["broken"].max()), 1) if len(data) else 1
    with paper_style():
        figure, panels = _panels([len(rows) for _, rows in parts], row=0.16)
        for axes, (target, rows) in zip(panels, parts, strict=True):
            y = range(len(rows))
            axes.barh(y, rows["broken"], height=0.7, color=COLOURS[target], alpha=0.45, linewidth=0)
            axes.barh(y, rows["only"], height=0.7, color=COLOURS[target])
            for place, row in enumerate(rows.to_dict(orient="records")):
                told = f"{row['broken']}" + (f" ({row['only']} alone)" if row["only"] else "")
                axes.text(row["broken"] + 0.01 * most, place, told, va="center", fontsize=6)
            axes.set_yticks(y, [label(run) for run in rows["run"]])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlim(0, 1.25 * most)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(axis="x")
            axes.set_title(NAMES[target], loc="left", color=COLOURS[target], fontweight="bold")
        panels[-1].set_xlabel("samples broken (dark: alone)")
    return figure


def tell_agreement(data: pd.DataFrame) -> str:
    """The runs in words."""
    told = [
        f"{NAMES[row['target']]}, {row['run']}: broke {row['broken']}, {row['only']} of them alone"
        for row in data.to_dict(orient="records")
    ]
    return "; ".join(told) + "."


def draw_batches(data: pd.DataFrame) -> Figure:
    """Clean (hollow) and worst case (filled) batch by batch; of many batches, in order of it."""
    few = data["batch"].nunique() <= FEW_BATCHES
    with paper_style():
        figure = Figure(figsize=(COLUMN, 1.9), layout="constrained")
        axes = figure.subplots()
        for number, (target, rows) in enumerate(data.groupby("target", sort=False)):
            colour, mark = COLOURS[str(target)], "os"[number]
            if not few:
                _draw_ranked(axes, rows, number, colour, NAMES[str(target)])
                continue
            axes.plot(rows["batch"], rows["clean"], mark, color=colour, markersize=3, markerfacecolor="none")
            axes.plot(rows["batch"], rows["worst_case"], mark, color=colour, markersize=3, label=NAMES[str(target)])
        _percent_axis(axes, across=False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("batch (hollow: clean, filled: worst case)" if few else "batches, in order of their accuracy")
        axes.set_ylabel("accuracy in %" if few else "accuracy in % (dashed: clean)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, borderaxespad=0)
    return figure


def tell_batches(data: pd.DataFrame) -> str:
    """The batches in words."""
    told = []
    for target, rows in data.groupby("target", sort=False):
        low, high = rows["worst_case"].min(), rows["worst_case"].max()
        told.append(
            f"{NAMES[str(target)]}: worst case between {percent(low)} % and {percent(high)} % over {len(rows)} batches"
        )
    return "; ".join(told) + "."


def draw_differences(data: pd.DataFrame) -> Figure:
    """Paired differences of accuracy with their 95 % intervals, a row a number and evaluation.

    Args:
        data: ``metric``, ``name``, ``difference``, ``difference_low`` and ``difference_high``.
    """
    names, metrics = list(dict.fromkeys(data["name"])), list(dict.fromkeys(data["metric"]))
    with paper_style():
        height = 0.75 + 0.16 * len(metrics) * (len(names) + 0.5) + 0.12 * len(names)
        figure = Figure(figsize=(COLUMN, height), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            rows = data[data["name"] == name]
            y = [metrics.index(metric) + (number + 0.5) / len(names) * 0.7 - 0.35 for metric in rows["metric"]]
            colour = PALETTE[(number + 2) % len(PALETTE)]
            axes.hlines(y, 100 * rows["difference_low"], 100 * rows["difference_high"], color=colour, linewidth=0.9)
            axes.plot(
                100 * rows["difference"], y, "os^vD"[number % 5], color=colour, markersize=4, label=label(name, 40)
            )
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set_yticks(range(len(metrics)), [metric.replace("_", " ") for metric in metrics])
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_xlabel("difference in points")
        figure.legend(loc="outside upper center", ncols=1)
    return figure


def draw_gallery(exhibits: Sequence[Exhibit], labels: Sequence[object]) -> Figure:
    """Broken samples: original, adversarial image and their difference, scaled up, two samples a row.

    Args:
        exhibits: at least one.
        labels: of each.
    """
    rows = -(-len(exhibits) // 2)
    with paper_style():
        figure = Figure(figsize=(COLUMN, 0.68 * rows + 0.1), layout="constrained")
        panels = figure.subplots(rows, 6, squeeze=False).reshape(-1, 3)
        for axes in panels.flatten():
            axes.set_axis_off()
        for (first, second, third), one, own in zip(panels, exhibits, labels, strict=False):
            clean, delta = one.clean / 255, one.delta.astype(float)
            largest = max(float(abs(delta).max()), 1e-12)
            for axes, pixels in ((first, clean), (second, clean + delta), (third, 0.5 + delta / (2 * largest))):
                image = pixels.clip(0, 1).transpose(1, 2, 0)
                axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=1)
            first.set_title(label(own, 12), fontsize=6, pad=2)
            second.set_title(f"{int(one.logits.argmax())}", fontsize=6, pad=2)
            third.set_title(f"\N{MULTIPLICATION SIGN} {0.5 / largest:.2g}", fontsize=6, pad=2)
    return figure


def _panels(rows: list[int], *, row: float, top: float = 0.6) -> tuple[Figure, list[Axes]]:
    """A figure with one panel above the other, each as high as its number of rows needs."""
    height = top + sum(row * count + 0.25 for count in rows)
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[count + 0.5 for count in rows])
    return figure, list(panels[:, 0])


def _percent_axis(axes: Axes, *, across: bool = True) -> None:
    """An axis of shares, labelled in percent; rows run from the top."""
    ticks = [0, 0.25, 0.5, 0.75, 1.0]
    if across:
        axes.set_xlim(0, 1.08)
        axes.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
        axes.set_ylim(max(axes.get_ylim()), min(axes.get_ylim()))
    else:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
    axes.grid(axis="x" if across else "y", color=GRID)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


KINDS = (
    Kind(
        "waterfall", "From clean to worst case",
        "Each run takes away the samples that it breaks and none before it had. What is left is the worst case.",
        ("attacks",), frames.waterfall, draw_waterfall, tell_waterfall,
    ),
    Kind(
        "transfer", "Surrogate × loss",
        "Large: accuracy of the target in % on the points of highest surrogate loss (a run's final), of the restart "
        "where it is lowest. Small: accuracy of the surrogate on the same points, those wrong when clean "
        "not excepted. Where the target is well above its surrogate, the points do not transfer. In a cascade a run "
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
