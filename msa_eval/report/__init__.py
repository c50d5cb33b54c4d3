"""What people look at, made from evidence alone: the model is not needed again."""

from msa_eval.report import frames
from msa_eval.report.comparison import Comparison, compare, paired, render_comparison
from msa_eval.report.entry import robustbench_entry
from msa_eval.report.figures import write_figures
from msa_eval.report.frames import spending
from msa_eval.report.page import render_page, write_page
from msa_eval.report.plots.catalog import Chart, charts
from msa_eval.report.plots.spending import draw_curves
from msa_eval.report.plots.waterfall import draw_waterfall
from msa_eval.report.style import paper_style, save, to_svg
from msa_eval.report.tables import render_tables
from msa_eval.report.text import (
    render_ablation,
    render_crosscheck,
    render_paper_table,
    render_sample,
    render_sizes,
    render_table,
)

__all__ = [
    "Chart", "Comparison", "charts", "compare", "draw_curves", "draw_waterfall", "frames", "paired", "paper_style",
    "render_ablation", "render_comparison", "render_crosscheck", "render_page", "render_paper_table", "render_sample",
    "render_sizes", "render_table", "render_tables", "robustbench_entry", "save", "spending", "to_svg", "write_figures",
    "write_page",
]  # fmt: skip
