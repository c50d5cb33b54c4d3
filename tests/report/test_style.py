"""Figures come out at column width, with embedded fonts, the same bytes each time, and leave no trace."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from msa_eval.report.style import COLUMN, PALETTE, paper_style, save


def _figure() -> Figure:
    with paper_style():
        figure = Figure(figsize=(COLUMN, 2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [1, 0], label="ε <b>&")
        axes.legend()
    return figure


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    first = save(_figure(), tmp_path / "a" / "curve.v1")
    second = save(_figure(), tmp_path / "b" / "curve.v1")
    assert [path.name for path in first] == ["curve.v1.pdf", "curve.v1.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_fonts_are_embedded_and_text_stays_text(tmp_path: Path) -> None:
    pdf, svg = save(_figure(), tmp_path / "curve")
    content = pdf.read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"/CreationDate" not in content
    root = ElementTree.parse(svg).getroot()
    texts = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]
    assert "ε <b>&" in texts
    assert float(str(root.get("width")).removesuffix("pt")) == pytest.approx(COLUMN * 72)
    assert not re.search(r"<dc:date>|matplotlib v", svg.read_text(encoding="utf-8"))


def test_settings_come_back() -> None:
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError), paper_style():
        raise RuntimeError
    assert dict(mpl.rcParams) == before


def test_what_the_user_has_set_does_not_show() -> None:
    plain = _figure().get_axes()[0].xaxis.get_label().get_size()
    with mpl.rc_context({"font.size": 30, "axes.labelsize": 30}):
        assert _figure().get_axes()[0].xaxis.get_label().get_size() == plain


DEFICIENCIES = {  # Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_are_told_apart_by_colour_blind_readers(deficiency: str) -> None:
    """Of the two targets clearly (ΔE 40 in CIELAB), of all pairs noticeably."""

    def lab(colour: str) -> np.ndarray:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        xyz = to_xyz @ seen / np.array([0.9505, 1, 1.089])
        f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    far = {pair: float(np.linalg.norm(lab(pair[0]) - lab(pair[1]))) for pair in itertools.combinations(PALETTE, 2)}
    assert far[PALETTE[0], PALETTE[1]] > 40
    assert min(far.values()) > 10
