"""Pictures of broken samples."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from msa_eval.evidence.gallery import Exhibit
from msa_eval.report.plots.axes import label
from msa_eval.report.style import COLUMN, paper_style


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
