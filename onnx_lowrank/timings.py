"""Latency entries of a report or a comparison in one form: who was timed how, with which ratios."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from onnx_lowrank import figures


@dataclasses.dataclass(frozen=True)
class Speedup:
    """A paired ratio and its 95 % interval."""

    name: str
    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """`1.22× (1.20–1.23)`."""
        return f"{figures.ratio(self.value)} ({figures.interval((self.low, self.high))})"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Models that were timed turn about: their statistics, the ratio of each to the first, the A/A control."""

    title: str
    inputs: str
    names: tuple[str, ...]
    stats: tuple[Mapping[str, Any], ...]
    ratios: tuple[Speedup, ...]
    control: Speedup | None

    @property
    def samples(self) -> tuple[list[float], ...]:
        """Raw milliseconds of each model; empty unless all have them."""
        raw = tuple([ms for ms in s.get("samples_ms") or () if figures.finite(ms)] for s in self.stats)
        return raw if all(raw) else ()

    @property
    def unsteady(self) -> bool:
        """Whether the original differs from itself."""
        return self.control is not None and not self.control.low <= 1 <= self.control.high


def timings(report: Mapping[str, Any]) -> list[Timing]:
    """All that was timed, in the order of the JSON."""
    if "models" in report:
        return _compared(report)
    names = ("original", "original again") if is_analysis(report) else ("original", "rewritten")
    return [_timing(entry, names, (entry,)) for entry in report.get("latency") or ()]


def is_analysis(report: Mapping[str, Any]) -> bool:
    """Whether the report says what could be won: sites with a choice, and no model written."""
    return report.get("status") == "unchanged" and any(site.get("kind") for site in report.get("sites") or ())


def _compared(report: Mapping[str, Any]) -> list[Timing]:
    rows = [row for row in report["models"] if row.get("latency")]
    if not rows:
        return []
    names = model_names(report)
    known = [names[0], *(name for row, name in zip(report["models"], names, strict=True) if row.get("latency"))]
    return [_timing(rows[0]["latency"], tuple(known), tuple(row["latency"] for row in rows))]


def model_names(report: Mapping[str, Any]) -> list[str]:
    """Names of compared models: file names, whole paths where two are equal, numbered where a file is repeated."""
    paths = [str(row.get("path")) for row in report["models"]]
    names = [path.replace("\\", "/").rpartition("/")[2] for path in paths]
    if len(set(names)) == len(names):
        return names
    return [path if paths.count(path) == 1 else f"{path} ({i + 1})" for i, path in enumerate(paths)]


def _timing(first: Mapping[str, Any], names: tuple[str, ...], entries: tuple[Mapping[str, Any], ...]) -> Timing:
    speedups = [_speedup(name, e.get("ratio"), e.get("ratio_ci")) for name, e in zip(names[1:], entries, strict=True)]
    ends = first.get("aa_ratio_ci")
    return Timing(
        title=how(first.get("threads"), first.get("clock")),
        inputs=", ".join(f"{name} {figures.dims(dims)}" for name, dims in (first.get("shape") or {}).items()),
        names=names,
        stats=(first.get("before") or {}, *(e.get("after") or {} for e in entries)),
        ratios=tuple(s for s in speedups if s),
        control=_speedup("A/A control", first.get("aa_ratio", _middle(ends)), ends),
    )


def how(threads: Any, clock: Any = None) -> str:
    """Threads and clock in words."""
    words = "default threads" if threads == 0 else f"{threads} thread{'' if threads == 1 else 's'}"
    return words + {"thread": ", CPU time", "wall": ", wall time"}.get(str(clock), "")


def _middle(ends: Any) -> float | None:
    return (ends[0] + ends[1]) / 2 if ends and all(figures.finite(e) for e in ends) else None


def _speedup(name: str, value: Any, ends: Any) -> Speedup | None:
    if not figures.finite(value) or not ends or not all(figures.finite(e) for e in ends):
        return None
    return Speedup(name, float(value), float(ends[0]), float(ends[1]))
