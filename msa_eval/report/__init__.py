"""What people look at, made from evidence alone: the model is not needed again."""

from msa_eval.report.charts import render_bars, render_curves, spending
from msa_eval.report.entry import robustbench_entry
from msa_eval.report.text import render_paper_table, render_sample, render_sizes, render_table

__all__ = [
    "render_bars",
    "render_curves",
    "render_paper_table",
    "render_sample",
    "render_sizes",
    "render_table",
    "robustbench_entry",
    "spending",
]
