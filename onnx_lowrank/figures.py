"""Numbers as people read them: three significant digits, units, a dash where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeGuard

MISSING: Final = "–"
Number = int | float


def finite(value: Any) -> TypeGuard[Number]:
    """Whether `value` is a number that can be drawn; JSON has null for what was not measured or is infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: Any, digits: int = 3) -> str:
    """Significant digits, with an exponent only below 0.0001 and from a million on."""
    if not finite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def fixed(value: Any, decimals: int) -> str:
    """A number of a column, so that the decimal points of the column stand below each other."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}" if finite(value) else MISSING  # no -0.00


def decimals(values: Iterable[Any]) -> int:
    """Decimals for a column of times: four significant digits of the largest."""
    largest = max((abs(v) for v in values if finite(v)), default=1.0)
    return 4 if largest < 1 else max(1, 3 - math.floor(math.log10(largest)))


def loss(value: Any) -> str:
    """A loss in a column: five decimals, an exponent below 0.0001 and from 10 000 on."""
    if value == 0:
        return "0"
    if not finite(value) or 1e-4 <= abs(value) < 1e4:
        return fixed(value, 5)
    return short(value)


def ratio(value: Any) -> str:
    """Before ÷ after."""
    return f"{value:.2f}×" if finite(value) else MISSING


def interval(ends: Any, decimals: int = 2) -> str:
    """A 95 % interval."""
    if not (isinstance(ends, Sequence) and len(ends) == 2 and all(finite(end) for end in ends)):
        return MISSING
    return f"{ends[0]:.{decimals}f}–{ends[1]:.{decimals}f}"


def size(value: Any) -> str:
    """Bytes, in powers of ten."""
    return f"{count(value)}B" if finite(value) and value >= 1000 else f"{value} B" if finite(value) else MISSING


def count(value: Any) -> str:
    """A large number with its prefix; ends in a space and the prefix where there is one."""
    if not finite(value):
        return MISSING
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            return f"{short(value / unit)} {prefix}"
    return str(value)


def percent(value: Any) -> str:
    """A share."""
    return f"{100 * value:.1f} %" if finite(value) else MISSING


def middle(text: str, most: int) -> str:
    """A long text without its middle: the beginning and the end tell more."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def dims(shape: Any) -> str:
    """A shape: 1×3×224×224."""
    return "×".join(str(n) for n in shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else MISSING
