"""Inline SVG out of strings: elements, axes, ticks. Colours and fonts are classes, so a page can be light or dark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from html import escape
from typing import Final

WIDTH: Final = 440
"""Drawn width: fills half a desktop page enlarged, and a telephone without unreadable labels."""


_COLOURS: Final = 8


def series(index: int) -> str:
    """The class of a model's colour: grey for the first, the others go round the rest of the palette (report.css)."""
    return f"s{index if index < _COLOURS else 1 + (index - 1) % (_COLOURS - 1)}"


def tag(name: str, *children: str, **attributes: str | float | None) -> str:
    """An element; attribute `text_anchor` is text-anchor, `class_` is class. Children are markup already."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{words}>{''.join(children)}</{name}>"


def _attribute(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def label(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    """Text."""
    return tag("text", escape(words), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def dot(x: float, y: float, class_: str, tip: str, radius: float = 3.2) -> str:
    """A data point that says its values when pointed at."""
    return tag("circle", tag("title", escape(tip)), cx=x, cy=y, r=radius, class_=f"mark {class_}")


def bar(x: float, y: float, width: float, height: float, class_: str, tip: str) -> str:
    """A bar that says its value when pointed at; never so thin that it is not seen."""
    title = tag("title", escape(tip))
    return tag("rect", title, x=x, y=y, width=max(width, 0.8), height=height, class_=f"mark {class_}")


def path(points: Iterable[tuple[float, float]], class_: str) -> str:
    """A line through points."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def drawing(name: str, height: float, *children: str) -> str:
    """The `svg` element; `name` is what a screen reader says."""
    return tag("svg", *children, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", class_="chart", aria_label=name)


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values onto pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies."""
        low, high = self._warp(self.low), self._warp(self.high)
        return self.start + (self._warp(value) - low) / (high - low) * (self.end - self.start)

    def _warp(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values between the ends."""
        return _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high, wanted)


def linear(values: Iterable[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """An axis around values, with a little room; from zero where lengths are compared."""
    known = list(values)
    low, high = min(known), max(known)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return Axis(0.0 if zero else low - room, high + room, start, end)


def logarithmic(values: Iterable[float], start: float, end: float) -> Axis:
    """An axis around positive values, at least one decade long."""
    known = list(values)
    low, high = min(known) / 1.6, max(known) * 1.6
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    return Axis(low, high, start, end, log=True)


def _round_steps(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 2, 5) if high / low < 200 else (1,)
    return [v for p in powers for part in parts if low <= (v := part * 10.0**p) <= high]


def tick_text(value: float) -> str:
    """A tick's label: no trailing zeros, no rounding noise."""
    text = f"{value:.10f}".rstrip("0").rstrip(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"
    return text.replace("e-0", "e-")


def x_axis(axis: Axis, top: float, bottom: float, name: str) -> str:
    """Grid lines, tick labels and the axis' name with its unit."""
    marks = [
        line(axis(v), top, axis(v), bottom, "grid") + label(axis(v), bottom + 15, tick_text(v), "tick", "middle")
        for v in axis.ticks()
    ]
    return "".join(marks) + label((axis.start + axis.end) / 2, bottom + 32, name, "axis", "middle")


def y_axis(axis: Axis, left: float, right: float, name: str) -> str:
    """Grid lines, tick labels, and the name with its unit above the axis."""
    marks = [
        line(left, axis(v), right, axis(v), "grid") + label(left - 6, axis(v) + 4, tick_text(v), "tick", "end")
        for v in axis.ticks(4)
    ]
    return "".join(marks) + label(0, axis.end - 10, name, "axis")


def legend(entries: Iterable[tuple[str, str]], y: float, x: float = 0) -> str:
    """Names beside a swatch of their class, in one row."""
    parts = []
    for class_, name in entries:
        parts.append(tag("rect", x=x, y=y - 9, width=10, height=10, rx=2, class_=class_))
        parts.append(label(x + 15, y, name, "tick"))
        x += 15 + 6.6 * len(name) + 14
    return "".join(parts)
