"""Numbers as people write them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any


def as_number(value: Any) -> float:
    """A number, or a fraction as a text.

    Raises:
        ValueError: when it is neither.

    >>> as_number("8/255") == 8 / 255, as_number("0.5 / 255"), as_number(".03")
    (True, 0.00196078431372549, 0.03)
    """
    try:
        if not isinstance(value, str):
            return float(value)
        above, separator, below = value.partition("/")
        return float(Fraction(above.strip()) / Fraction(below.strip() if separator else 1))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise ValueError(f"expected a number or a fraction such as 8/255, but got {value!r}") from error
