"""What people look at, made from evidence alone: the model is not needed again."""

from msa_eval.report.charts import Chart, charts, draw_curves, draw_waterfall
from msa_eval.report.frames import spending
from msa_eval.report.style import paper_style, save, to_svg
from msa_eval.report.text import render_sample, render_sizes, render_table

__all__ = [
    "Chart", "charts", "draw_curves", "draw_waterfall", "paper_style", "render_sample", "render_sizes", "render_table",
    "save", "spending", "to_svg",
]  # fmt: skip
