"""Figures: the curves in them are the numbers, and nothing needs a display."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy.integrate import trapezoid

from msa_eval.report.style import to_svg
from msa_eval.sensitivity import analyse, empirical_cdf, isotropic_cdf
from msa_eval.sensitivity.empirical import RESNET50_FC, RESNET50_L2
from msa_eval.sensitivity.figures import figure_1, figure_2, figure_3


def _lines(figure: Figure, axes: int = 0) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in figure.axes[axes].get_lines()}


def test_figure_1_draws_the_table() -> None:
    rows = [
        {"head": head, "eps": eps, "run": run, "value": value - eps, "low": 0.1, "high": 0.9, "n": 10}
        for head, value in (("fc", 0.9), ("l2", 0.8))
        for eps in (4 / 255, 0.0, 2 / 255)
        for run in ("own", "worst_case", "ste:apgd-ce:0")
    ]
    figure = figure_1(pd.DataFrame(rows), title="a & <b>")
    lines = _lines(figure)
    assert len(lines) == 4
    np.testing.assert_allclose(lines["ℓ2 head, own gradient, cross-entropy"][:, 0], [0, 2, 4])
    np.testing.assert_allclose(
        lines["FC head, every run and iterate"][:, 1], [90, 100 * (0.9 - 2 / 255), 100 * (0.9 - 4 / 255)]
    )
    assert "a &amp; &lt;b&gt;" in to_svg(figure)


def test_figure_2_draws_eq_29() -> None:
    lines = _lines(figure_2((2, 100)))
    for d in (2, 100):
        x, y = lines[f"d = {d}"].T
        np.testing.assert_allclose(y, isotropic_cdf(x, d))
    with pytest.raises(ValueError, match="at least one"):
        figure_2(())


def test_figure_3_draws_eq_13_and_the_papers_angles() -> None:
    figure = figure_3()
    x, y = _lines(figure, 2)["Eq. 13"].T
    np.testing.assert_allclose(y, empirical_cdf(x, RESNET50_FC, RESNET50_L2))
    for axes, peak in ((0, 66.81), (1, 74.3)):
        curve = _lines(figure, axes)["own class"]
        assert curve[curve[:, 1].argmax(), 0] == pytest.approx(peak, abs=0.3)
        assert trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(1, abs=1e-3)


def test_figure_3_of_measured_angles_and_without_a_fit() -> None:
    z = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    found = analyse(
        z, torch.arange(60) % 3, torch.eye(5)[:3], torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    )
    figure = figure_3(found.fc, found.l2, measured=found)
    x, y = _lines(figure, 2)["measured"].T
    ratios = found.sensitivity.ratio.numpy().ravel()
    np.testing.assert_allclose(y, [(ratios <= at).mean() for at in x])
    same = torch.ones(4, 5)
    degenerate = analyse(same, torch.arange(4) % 3, torch.eye(5)[:3], torch.eye(5)[:3])
    assert len(degenerate.misfits) == 2
    assert len(to_svg(figure_3(degenerate.fc, degenerate.l2, measured=degenerate))) > 1000
    zero = analyse(torch.zeros(4, 5), torch.arange(4) % 3, torch.eye(5)[:3], torch.eye(5)[:3])
    assert len(to_svg(figure_3(zero.fc, zero.l2, measured=zero))) > 1000


def test_no_window_is_opened() -> None:
    """In a process of its own: another test's imports are no concern of ours."""
    code = "import sys; from msa_eval.sensitivity.figures import figure_2; figure_2((2,)); print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code]  # the installed package, not the folder
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "matplotlib.figure" in loaded
    assert "matplotlib.pyplot" not in loaded
