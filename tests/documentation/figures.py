"""The figures of README and documentation: python -m tests.documentation.figures.

The gap between reported and worst-case accuracy is drawn from results/benchmarks alone.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from msa_eval.defense.contexts import CONTEXTS
from msa_eval.report.style import COLOURS, GRID, INK, paper_style, to_svg

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "figures"
MODELS = {"digits": "digits, 192 images", "cifar10-wrn10-2": "CIFAR-10, 126 images"}


def bars(model: str) -> dict[str, float]:
    """The accuracies of HPM in ``joint``, in %, by what they are called."""
    with (ROOT / "results" / "benchmarks" / f"budget-{model}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == "defense"]
    last = {row["contender"]: row for row in rows}
    clean = next(row for row in rows if row["contender"] == "paper" and float(row["passes"]) == 0)
    return {
        "no attack": 100 * float(clean["worst_case"]),
        "AutoAttack, as it reports": 100 * float(last["autoattack"]["own_count"]),
        "the paper's protocol": 100 * float(last["paper"]["worst_case"]),
        "msa-eval": 100 * float(last["msa"]["worst_case"]),
    }


def draw() -> Figure:
    """Two panels of four bars, one a model."""
    with paper_style():
        figure = Figure(figsize=(6.9, 1.6), layout="constrained")
        for axes, (model, title) in zip(figure.subplots(1, 2, sharey=True), MODELS.items(), strict=True):
            values = bars(model)
            colours = [GRID, GRID, GRID, COLOURS["defense"]]
            drawn = axes.barh(list(values), list(values.values()), color=colours, height=0.7)
            axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=6.5, color=INK)
            axes.set_title(title, loc="left")
            axes.set_xlim(0, 100)
            axes.set_xlabel("accuracy of HPM, %")
        axes.invert_yaxis()  # shared by both
        return figure


def context(name: str) -> str:
    """A batch of five images as an SVG: what the attacker moves or chooses, and which image is judged.

    Args:
        name: of the context.
    """
    size, gap, left, top = 44, 12, 12, 34
    moved = {"joint": range(5), "solo": (2,), "alone": (0,), "composed": (2,)}[name]
    count = 1 if name == "alone" else 5
    parts = []
    for place in range(count):
        x = left + place * (size + gap)
        mine = place in moved
        fill, text = (COLOURS["defense"], "x + δ") if mine else ("#f2f2f2", "clean")
        chosen = name == "composed" and not mine
        dashes = ' stroke-dasharray="4 3"' if chosen else ""
        edge = COLOURS["defense"] if chosen else INK
        parts.append(
            f'<rect x="{x}" y="{top}" width="{size}" height="{size}" rx="4" fill="{fill}" stroke="{edge}" '
            f'stroke-width="{2 if chosen else 1}"{dashes}/>'
            f'<text x="{x + size / 2}" y="{top + size / 2 + 4}" text-anchor="middle" '
            f'fill="{"#ffffff" if mine else INK}">{text}</text>'
        )
        if mine:
            parts.append(
                f'<text x="{x + size / 2}" y="{top + size + 16}" text-anchor="middle" fill="{INK}">judged</text>'
            )
    ask = {
        "joint": "The attacker moves every image; each is judged.",
        "solo": "The attacker moves one image; its companions stay clean.",
        "alone": "The attacker moves one image, in a batch of one.",
        "composed": "The attacker moves one image and chooses its clean companions (dashed).",
    }[name]
    width, height = 580, top + size + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{ask}" font-family="DejaVu Sans, sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        f'<text x="{left}" y="20" font-size="12.5" fill="{INK}"><tspan font-weight="bold">{name}</tspan>: {ask}</text>'
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    (FOLDER / "gap.svg").write_text(to_svg(draw()), encoding="utf-8")
    for one in CONTEXTS:
        (FOLDER / f"context-{one}.svg").write_text(context(one), encoding="utf-8")
