"""Original, precision alone, low rank alone, both, as a table: what the HTML, the Markdown and the terminal show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnx_lowrank import figures
from onnx_lowrank.views import Column, Table, number, words

Json = Mapping[str, Any]


def precisions(report: Json) -> Table | None:
    """A column for each model, the measured one last; None where no precision was asked for."""
    models = list(report.get("precisions") or ())
    if len(models) < 2:
        return None
    decimals = figures.decimals(m.get("p50_ms") for m in models)
    alone = str(models[1].get("name"))
    rows: list[tuple[str, str, Callable[[Json], str]]] = [
        ("latency p50, ms", "p50_ms", lambda m: figures.fixed(m.get("p50_ms"), decimals)),
        ("speed-up", "ratio", lambda m: _ratio(m, "ratio")),
        (f"against {alone}", "over_precision", lambda m: _ratio(m, "over_precision")),
        ("file", "bytes", lambda m: figures.size(m.get("bytes"))),
        ("loss", "loss", lambda m: figures.loss(m.get("loss"))),
    ]
    body = tuple(
        (words(name), *(number(m.get(key), text(m), strong=m is models[-1]) for m in models))
        for name, key, text in rows
    )
    return Table("precisions", (Column("", numeric=False), *(Column(str(m.get("name"))) for m in models)), body)


def _ratio(model: Json, key: str) -> str:
    """`3.82× (3.81–3.85)`; a dash for the model that is compared with itself."""
    if not figures.finite(model.get(key)):
        return figures.MISSING
    return f"{figures.ratio(model[key])} ({figures.interval(model.get(f'{key}_ci'))})"
