"""Figures and tables as they stand in a page: SVG in the page's colours, CSV behind a link, JSON in a script."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Set
from html import escape
from typing import Any
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from msa_eval.report.style import GRID, INK, PALETTE, to_svg

_VARIABLES = {
    INK: "currentColor",
    GRID: "var(--grid)",
    PALETTE[0].lower(): "var(--c0)",
    PALETTE[1].lower(): "var(--c1)",
}


def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """A figure as an SVG element without a background, in colours that a page sets, and with a text alternative.

    Args:
        figure: made under `msa_eval.report.style.paper_style`.
        name: unlike that of any other figure of the page; the element's ids start with it.
        alt: what the figure shows.
    """
    svg = to_svg(figure, transparent=True)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    name = escape(name)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', svg))
    svg = re.sub(r"<[^>]*>", lambda found: _tag(found.group(), name, used), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r">\s+<", "><", svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    opening = opening.replace("<svg", f'<svg role="img" aria-labelledby="{name}-alt"', 1)
    return Markup(f'{opening}><desc id="{name}-alt">{escape(alt)}</desc>{rest}')


def _tag(tag: str, name: str, used: Set[str]) -> str:
    """A tag in a page's colours, shorter, and with ids that start with the figure's name; texts stay as they are."""
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, variable)
    tag = re.sub(r' id="([\w.-]+)"', lambda found: found.group() if found[1] in used else "", tag)
    tag = re.sub(r'(url\(#| id="|href="#)(?=[\w.-]+)', lambda found: f"{found[1]}{name}-", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", tag)
    tag = tag.replace("font-family: 'DejaVu Sans', sans-serif; ", "")
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found.group()):.2f}".rstrip("0").rstrip("."), tag)


def csv_link(table: pd.DataFrame) -> str:
    """A table as CSV in a data link.

    >>> csv_link(pd.DataFrame({"a": ["<x>", "y"], "b": [0.5, 1 / 3]}))
    'data:text/csv;charset=utf-8,a,b%0A%3Cx%3E,0.5%0Ay,0.3333333333%0A'
    """
    text = table.to_csv(index=False, lineterminator="\n", float_format="%.10g")
    return f"data:text/csv;charset=utf-8,{quote(text, safe=',:;@/')}"


def script_json(value: Any) -> Markup:
    r"""JSON that can stand in a script element: no tag can begin or end in it, and what is not a number is null.

    >>> print(script_json({"a": ["</script>", float("nan"), 0.5]}))
    {"a":["\u003c/script\u003e",null,0.5]}
    """
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
