"""Latency entries of a report or a comparison in one form: who was timed how, with which ratios."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from onnx_lowrank import figures
from onnx_lowrank.labels import file_names
from onnx_lowrank.providers import Provider


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
class Way:
    """All that two timings must share to be of the same thing; `options` is None where a report does not tell them."""

    provider: str
    options: tuple[tuple[str, str], ...] | None
    threads: Any
    clock: str
    shape: tuple[tuple[str, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Way:
        """Of a latency entry, or of one of `configurations`, which has no clock."""
        provider = Provider(str(entry.get("provider") or "cpu")).short
        given = entry.get("provider_options", {} if provider == "cpu" else None)
        return cls(
            provider=provider,
            options=None if given is None else tuple(sorted((str(k), str(v)) for k, v in given.items())),
            threads=entry.get("threads"),
            clock=str(entry.get("clock") or ""),
            shape=tuple(sorted((str(name), tuple(dims)) for name, dims in (entry.get("shape") or {}).items())),
        )

    @property
    def name(self) -> str:
        """Everything in words: `cuda (use_tf32=0), 1 thread, wall time, x 1×3×224×224`."""
        options = " ".join(f"{key}={value}" for key, value in self.options or ())
        provider = f"{self.provider} ({options})" if options else self.provider
        return ", ".join(part for part in (provider, how(self.threads, self.clock), shapes(dict(self.shape))) if part)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Models that were timed turn about: their statistics, the ratio of each to the first, the A/A control."""

    title: str
    inputs: str
    names: tuple[str, ...]
    stats: tuple[Mapping[str, Any], ...]
    ratios: tuple[Speedup, ...]
    control: Speedup | None
    way: Way
    transfers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def moved(self) -> str:
        """What it takes to move inputs and outputs, on a card; empty where nothing is moved."""
        parts = [f"{key.removesuffix('_ms')} {figures.short(ms)} ms" for key, ms in self.transfers.items()]
        return f"Transfers, in no other time: {', '.join(parts)}" if parts else ""

    @property
    def samples(self) -> tuple[list[float], ...]:
        """Raw milliseconds of each model; empty unless all have them."""
        raw = tuple([ms for ms in s.get("samples_ms") or () if figures.finite(ms)] for s in self.stats)
        return raw if all(raw) else ()


def timings(report: Mapping[str, Any]) -> list[Timing]:
    """All that was timed, in the order of the JSON."""
    if "models" in report:
        return _compared(report)
    names = ("original", "original again") if is_analysis(report) else ("original", "rewritten")
    entries = list(report.get("latency") or ())
    return [_timing(entry, names, (entry,), title) for entry, title in zip(entries, _titles(entries), strict=True)]


def is_analysis(report: Mapping[str, Any]) -> bool:
    """Whether the report says what could be won: sites with a choice, and no model written."""
    return report.get("status") == "unchanged" and any(site.get("kind") for site in report.get("sites") or ())


def _compared(report: Mapping[str, Any]) -> list[Timing]:
    names, models = model_names(report), report["models"]
    first = names[report.get("baseline") or 0]
    count = 1 + max((len(row.get("latencies") or ()) for row in models), default=0)
    ways = [[(name, _entry(row, i)) for name, row in zip(names, models, strict=True)] for i in range(count)]
    known = [[(name, entry) for name, entry in way if entry] for way in ways]
    known = [way for way in known if way]
    titles = _titles([way[0][1] for way in known])
    return [
        _timing(way[0][1], (first, *(name for name, _ in way)), tuple(entry for _, entry in way), title)
        for way, title in zip(known, titles, strict=True)
    ]


def _entry(row: Mapping[str, Any], way: int) -> Mapping[str, Any]:
    """How a model was timed in one configuration; empty where it was not."""
    if way == 0:
        return row.get("latency") or {}
    more = row.get("latencies") or ()
    return (more[way - 1] if way <= len(more) else None) or {}


def _titles(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Threads and clock of each entry; provider and shapes too where they differ."""
    sizes = [shapes(e.get("shape") or {}) for e in entries]
    providers = [str(e.get("provider") or "") for e in entries]
    titles = []
    for entry, shape, provider in zip(entries, sizes, providers, strict=True):
        parts = [how(entry.get("threads"), entry.get("clock"))]
        parts += [provider] if len(set(providers)) > 1 else []
        parts += [shape] if len(set(sizes)) > 1 else []
        titles.append(", ".join(part for part in parts if part))
    return titles


def shapes(known: Mapping[str, Any], most: int | None = None) -> str:
    """Inputs with their shapes: `x 1×3×224×224`; those after the first `most` are counted."""
    parts = [f"{name} {figures.dims(dims)}".rstrip() for name, dims in known.items()]  # a scalar has none
    left = len(parts) - (len(parts) if most is None else most)
    return ", ".join([*parts[:most], f"and {left} more"] if left > 0 else parts)


def model_names(report: Mapping[str, Any]) -> list[str]:
    """Names of compared models."""
    return file_names([str(row.get("path")) for row in report["models"]])


def _timing(
    first: Mapping[str, Any], names: tuple[str, ...], entries: tuple[Mapping[str, Any], ...], title: str
) -> Timing:
    speedups = [_speedup(name, e.get("ratio"), e.get("ratio_ci")) for name, e in zip(names[1:], entries, strict=True)]
    ends = first.get("aa_ratio_ci")
    return Timing(
        title=title,
        inputs=shapes(first.get("shape") or {}),
        names=names,
        stats=(first.get("before") or {}, *(e.get("after") or {} for e in entries)),
        ratios=tuple(s for s in speedups if s),
        control=_speedup("A/A control", first.get("aa_ratio", _middle(ends)), ends),
        way=Way.of(first),
        transfers=first.get("transfers") or {},
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
