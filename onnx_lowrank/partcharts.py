"""The charts of a report's details: losses of the single samples, milliseconds of the nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from onnx_lowrank import figures, svg
from onnx_lowrank.charts import heading, pairs

Json = Mapping[str, Any]
_RIGHT: Final = svg.WIDTH - 10.0
_BINS: Final = 30
_NODES: Final = 12
_LEAST: Final = 1e-12


def sample_losses(rows: Sequence[tuple[str, Sequence[Any]]], limit: float | None) -> str:
    """A row for each model: how many samples lost how much, on a logarithmic axis; nothing when all lost nothing."""
    known = [(n, [max(float(v), _LEAST) for v in values if figures.finite(v)]) for n, values in rows]
    known = [(n, values) for n, values in known if values and max(values) > _LEAST]
    if not known:
        return ""
    limits = [limit] if limit else []
    axis = svg.logarithmic([*(v for _, values in known for v in values), *limits], 6, _RIGHT)
    edges = np.geomspace(axis.low, axis.high, _BINS + 1)
    parts, y, step = [], 6.0, 74.0
    for i, (name, values) in enumerate(known):
        counts, _ = np.histogram(values, edges)
        median = math.exp(float(np.median(np.log(values))))
        said = f"median {figures.short(median)}, worst {figures.short(max(values))}"
        words, lower = heading(name, said, y + 12)
        y += lower
        base = y + step - 8
        for n, left, right in zip(counts, edges, edges[1:], strict=False):
            if n:
                x, height = axis(float(left)), 42 * n / counts.max()
                tip = f"{n} samples, loss {figures.short(left)}–{figures.short(right)}"
                parts.append(
                    svg.bar(x, base - height, axis(float(right)) - x - 1, height, f"{svg.series(i + 1)} fill", tip)
                )
        parts += words
        y += step
    bottom = y - 8
    head = [svg.x_axis(axis, 6, bottom, f"loss of one sample (log), {len(known[0][1])} samples")]
    if limit:
        head.append(svg.line(axis(limit), 6, axis(limit), bottom, "limit"))
    return svg.drawing("Loss by sample", bottom + 40, *head, *parts)


def profiled(report: Json) -> str:
    """The compared model whose nodes are drawn: the last one; empty where there is only one."""
    rows = list(report.get("profile") or ())
    return str(rows[-1].get("model") or "") if rows else ""


def nodes(report: Json) -> str:
    """The nodes that took most of the time, before and after; of one model when several were compared."""
    name = profiled(report)
    rows = [row for row in report.get("profile") or () if not name or row.get("model") == name]
    timed = [r for r in rows if figures.finite(r.get("before_ms")) or figures.finite(r.get("after_ms"))]
    largest = sorted(timed, key=lambda r: -max(r.get("before_ms") or 0.0, r.get("after_ms") or 0.0))[:_NODES]
    return pairs(
        [
            (str(r.get("node")), r.get("before_ms"), r.get("after_ms"), str(r.get("choice") or r.get("op") or ""))
            for r in largest
        ],
        "Nodes before and after",
        "milliseconds inside the model",
    )
