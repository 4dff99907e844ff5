"""The charts of the HTML report: each takes figures of the JSON and returns one inline SVG, or "" without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from onnx_lowrank import figures, svg
from onnx_lowrank.figures import middle
from onnx_lowrank.timings import Speedup, Timing
from onnx_lowrank.views import by_gain, choice, common_prefix

Json = Mapping[str, Any]
_RIGHT: Final = svg.WIDTH - 10.0
_BINS: Final = 36
_LINE: Final = 54
_SITES: Final = 15


def distribution(timing: Timing) -> str:
    """A row for each model: a histogram of its runs where they were kept, else its percentiles."""
    return _histograms(timing) if timing.samples else _medians(timing)


def _histograms(timing: Timing) -> str:
    # A few runs of wall time are interrupted for tens of milliseconds; they would press all others into one bin.
    shown = [np.percentile(s, 95) for s in timing.samples]
    low, high = min(map(min, timing.samples)), float(max(shown))
    axis = svg.linear((low, high), 6, _RIGHT)
    edges = np.linspace(axis.low, axis.high, _BINS + 1)
    parts, y, step = [], 0.0, 74.0
    for i, (name, runs) in enumerate(zip(timing.names, timing.samples, strict=True)):
        counts, _ = np.histogram(runs, edges)
        median, beyond = float(np.median(runs)), sum(r > axis.high for r in runs)
        said = f"p50 {figures.short(median)} ms, {len(runs)} runs{f', {beyond} beyond the axis' if beyond else ''}"
        words, lower = heading(name, said, y + 14)
        y += lower
        base = y + step - 8
        for n, left, right in zip(counts, edges, edges[1:], strict=False):
            if n:
                height, tip = 46 * n / counts.max(), f"{n} runs, {figures.short(left)}–{figures.short(right)} ms"
                x = axis(float(left))
                parts.append(
                    svg.bar(x, base - height, axis(float(right)) - x - 1, height, f"{svg.series(i)} fill", tip)
                )
        parts += [svg.line(axis(median), base - 50, axis(median), base, "median"), *words]
        y += step
    name = "milliseconds per run"
    return svg.drawing(f"Latency, {timing.title}", y + 30, svg.x_axis(axis, 20, y - 8, name), *parts)


def heading(name: str, said: str, y: float) -> tuple[list[str], float]:
    """A model's name and its figures as labels on one line, on two where that is too long; and the room of the second.

    Lines are as long as a telephone shows them.
    """
    if len(name) + len(said) + 2 <= _LINE:
        return [svg.label(6, y, f"{name}: {said}", "name")], 0.0
    return [svg.label(6, y, middle(name, _LINE), "name"), svg.label(6, y + 15, said, "tick")], 15.0


def _medians(timing: Timing) -> str:
    rows = [(n, s) for n, s in zip(timing.names, timing.stats, strict=True) if figures.finite(s.get("p50_ms"))]
    if not rows:
        return ""
    tails = {n: [float(s[k]) for k in ("p90_ms", "p99_ms") if figures.finite(s.get(k))] for n, s in rows}
    known = [float(s["p50_ms"]) for _, s in rows] + [ms for tail in tails.values() for ms in tail]
    axis = svg.linear(known, 6, _RIGHT, zero=True)
    parts, y = [], 0.0
    for i, (name, stats) in enumerate(rows):
        p50 = float(stats["p50_ms"])
        parts.append(svg.label(6, y + 14, f"{middle(name, 44)}: p50 {figures.short(p50)} ms", "name"))
        tip = f"{name}: p50 {p50} ms, {stats.get('runs')} runs"
        parts.append(svg.bar(axis(0), y + 21, axis(p50) - axis(0), 14, f"{svg.series(i)} fill", tip))
        for tail in tails[name]:
            parts.append(svg.line(axis(p50), y + 28, axis(tail), y + 28, "median"))
            parts.append(svg.dot(axis(tail), y + 28, f"{svg.series(i)} fill", f"{name}: p90 or p99 {tail} ms"))
        y += 46
    return svg.drawing(
        f"Latency, {timing.title}", y + 36, svg.x_axis(axis, 18, y, "median, milliseconds per run"), *parts
    )


def intervals(known: Sequence[Timing]) -> str:
    """Each paired ratio with its 95 % interval, and the A/A controls: what noise alone looks like."""
    rows = list(_ratios(known))
    ends = [v for _, found, _ in rows if found for v in (found.low, found.high)]
    if not ends:
        return ""
    axis = svg.linear([1.0, *ends], 10, _RIGHT)
    bottom = sum(36.0 if found else 24.0 for _, found, _ in rows) + 6
    parts = [svg.x_axis(axis, 0, bottom, "original ÷ model: above 1 is faster (×)")]
    parts.append(svg.line(axis(1), 0, axis(1), bottom, "reference"))
    y = -10.0
    for name, found, class_ in rows:
        if found is None:
            y += 24
            parts.append(svg.label(10, y + 6, middle(name, 56), "name way"))
            continue
        y += 36
        words = f"{name}: {found.value:.3f} ({found.low:.3f}–{found.high:.3f})"
        parts.append(svg.label(10, y - 12, words, "name"))
        parts.append(svg.line(axis(found.low), y, axis(found.high), y, f"{class_} range"))
        parts.append(svg.dot(axis(found.value), y, f"{class_} fill", words, 4.5))
    return svg.drawing("Speed-up with 95 % intervals", bottom + 40, *parts)


def _ratios(known: Sequence[Timing]) -> Iterator[tuple[str, Speedup | None, str]]:
    """Rows of the chart of intervals: name, ratio, colour; without a ratio a head, where models and ways vary."""
    many = any(len(timing.ratios) > 1 for timing in known)
    headed = many and len(known) > 1
    for timing in known:
        if headed:
            yield timing.title, None, ""
        for ratio in timing.ratios:
            name = middle(ratio.name, 34) if many else middle(timing.title, 34)
            yield name, ratio, svg.series(timing.names.index(ratio.name))
        if timing.control:
            yield middle("A/A control" if headed else f"A/A control, {timing.title}", 34), timing.control, "s0"


def sites(report: Json) -> str:
    """The sites that gained most, then the slowest: milliseconds before and after, on the fragment alone."""
    timed = [s for s in by_gain(report) if figures.finite(s.get("ms_before"))][:_SITES]
    prefix = common_prefix(report)
    rows = [
        (str(s.get("node")).removeprefix(prefix), s.get("ms_before"), _after(s) if s.get("kind") else None, choice(s))
        for s in timed
    ]
    return pairs(rows, "Sites before and after", "milliseconds, the fragment alone")


def pairs(rows: Sequence[tuple[str, Any, Any, str]], name: str, axis_name: str) -> str:
    """Milliseconds before and after, a pair of bars for each row: (name, before, after, remark); None is not drawn."""
    known = [float(v) for _, old, new, _ in rows for v in (old, new) if figures.finite(v)]
    if not known:
        return ""
    axis = svg.linear(known, 6, _RIGHT, zero=True)
    bottom = 34.0 * len(rows) + 16
    parts = [svg.legend([("s0 fill", "before"), ("s1 fill", "after")], 10, 6)]
    parts.append(svg.x_axis(axis, 20, bottom + 4, axis_name))
    for i, (title, old, new, remark) in enumerate(rows):
        y = 34.0 * i + 36
        parts.append(svg.label(6, y - 5, middle(title, 42), "tick ink"))
        parts.append(svg.label(_RIGHT, y - 5, middle(remark, 22), "tick", "end"))
        tip = f"{title}: {_ms(old)} → {_ms(new)}, {remark}"
        for value, class_, down in ((old, "s0 fill", 0), (new, "s1 fill", 7)):
            if figures.finite(value):
                parts.append(svg.bar(axis(0), y + down, axis(float(value)) - axis(0), 6, class_, tip))
    return svg.drawing(name, bottom + 44, *parts)


def _ms(value: Any) -> str:
    return f"{value} ms" if figures.finite(value) else figures.MISSING


def _after(site: Json) -> float:
    return float(site["ms_after"] if figures.finite(site.get("ms_after")) else site["ms_before"])


LOSSES: Final = {
    "relative": "relative squared error of the outputs",
    "cosine": "1 − cosine of the outputs",
    "top1": "share of positions with another largest entry",
    "kl": "KL divergence, nats",
}
"""What a loss is in words; the user's own has the name of its function."""


def losses(rows: Sequence[tuple[str, float]], limit: float | None, metric: str = "relative") -> str:
    """Loss of each model on a common scale, with the limit."""
    if not rows:
        return ""
    axis = svg.linear([*(v for _, v in rows), limit or 0.0, 1e-12], 6, _RIGHT, zero=True)
    bottom = 40.0 * len(rows) + 14
    parts = [svg.x_axis(axis, 14, bottom, f"loss: {middle(LOSSES.get(metric, metric), 50)}")]
    for i, (name, loss) in enumerate(rows):
        y = 40.0 * i + 30
        parts.append(svg.label(6, y - 6, f"{middle(name, 44)}: {figures.short(loss)}", "name"))
        parts.append(svg.bar(axis(0), y, axis(loss) - axis(0), 14, f"{svg.series(i + 1)} fill", f"{name}: {loss}"))
    if limit:
        parts.append(svg.line(axis(limit), 10, axis(limit), bottom, "limit"))
        parts.append(svg.label(axis(limit) - 5, 9, f"limit {figures.short(limit, 1)}", "tick limit-name", "end"))
    return svg.drawing("Loss against its limit", bottom + 40, *parts)
