"""Tables of a report's details: outputs, cold starts, times by node, fusions, configurations, change since then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx_lowrank import figures
from onnx_lowrank.timings import Timing, model_names, timings
from onnx_lowrank.views import Cell, Column, Table, number, words

Json = Mapping[str, Any]
Format = Callable[[Any], str]


def _text(key: str, name: str) -> tuple[str, str, None]:
    return key, name, None


def _table(key: str, rows: Any, columns: Sequence[tuple[str, str, Format | None]]) -> Table | None:
    """Rows of flat objects under the columns that occur in them; a column without a format holds text."""
    known = [row for row in rows or () if isinstance(row, Mapping)]
    used = [c for c in columns if any(row.get(c[0]) is not None for row in known)]
    if not known or not used:
        return None
    body = tuple(tuple(_cell(row.get(k), text) for k, _, text in used) for row in known)
    return Table(key, tuple(Column(name, text is not None) for _, name, text in used), body)


def _cell(value: Any, text: Format | None) -> Cell:
    return words(value) if text is None else number(value, text(value))


def _ms(rows: Any, *keys: str) -> Format:
    """One number of decimals for all columns of times."""
    places = figures.decimals(row.get(key) for row in rows or () for key in keys)
    return lambda value: figures.fixed(value, places)


def accuracy(report: Json) -> Table | None:
    """Every output of every model against the original's: the tolerances that would be needed, and the worst sample."""
    columns = [
        _text("model", "model"),
        _text("output", "output"),
        ("samples", "samples", lambda v: figures.fixed(v, 0)),
        ("tolerance_abs", "absolute tolerance", figures.short),
        ("tolerance_rel", "relative tolerance", figures.short),
        ("tolerance_of_peak", "absolute ÷ peak", figures.short),
        ("cosine", "cosine", lambda v: figures.fixed(v, 6)),
        ("sqnr_db", "SQNR dB", lambda v: figures.fixed(v, 1)),
        ("worst_sample", "worst sample", lambda v: figures.fixed(v, 0)),
        ("worst_loss", "its loss", figures.loss),
        ("differing", "entries that differ", figures.percent),
        ("top1", "same top 1", figures.percent),
        ("top5", "top 1 in top 5", figures.percent),
    ]
    return _table("accuracy", report.get("accuracy"), columns)


def cold(report: Json) -> Table | None:
    """What a fresh process pays: loading, the first run, memory."""
    rows = [
        {**row, "model_bytes": _difference(row.get("peak_bytes"), row.get("base_bytes"))}
        for row in report.get("cold") or ()
    ]
    times = _ms(rows, "load_ms", "first_run_ms")
    columns = [
        _text("model", "model"),
        ("load_ms", "load ms", times),
        ("first_run_ms", "first run ms", times),
        ("peak_bytes", "peak memory", figures.size),
        ("model_bytes", "of it the model's", figures.size),
        ("processes", "processes", lambda v: figures.fixed(v, 0)),
    ]
    return _table("cold", rows, columns)


def _difference(a: Any, b: Any) -> int | None:
    return int(a - b) if figures.finite(a) and figures.finite(b) else None


def profile(report: Json) -> Table | None:
    """Nodes of the original with their time before and after, and what the runtime ran in their place."""
    rows = [{**row, "saved_ms": _saved(row)} for row in report.get("profile") or ()]
    times = _ms(rows, "before_ms", "after_ms")
    columns = [
        _text("model", "model"),
        _text("node", "node"),
        _text("op", "op"),
        _text("choice", "choice"),
        ("before_ms", "before ms", times),
        ("after_ms", "after ms", times),
        ("saved_ms", "saved ms", times),
        _text("ran_before", "ran before"),
        _text("ran_after", "ran after"),
    ]
    return _table("profile", rows, columns)


def _saved(row: Json) -> float | None:
    """A node that no longer runs saves all its time; one that did not run before costs it."""
    old, new = row.get("before_ms"), row.get("after_ms")
    if not (figures.finite(old) or figures.finite(new)):
        return None
    return float(old or 0) - float(new or 0)


def fusions(report: Json) -> Table | None:
    """Operators that the runtime made or put in, counted before and after."""
    whole = lambda v: figures.fixed(v, 0)  # noqa: E731
    columns = [
        _text("model", "model"),
        _text("op", "operator"),
        _text("what", "what it is"),
        ("before", "before", whole),
        ("after", "after", whole),
        _text("change", "change"),
        _text("places", "lost at"),
    ]
    rows = [{**row, "places": ", ".join(row.get("lost_at") or ()) or None} for row in report.get("fusions") or ()]
    return _table("fusions", rows, columns)


def fallback(report: Json) -> Table | None:
    """Nodes that another provider ran, or that copy between host and device."""
    rows = (report.get("environment") or {}).get("fallback")
    columns = [
        _text("model", "model"),
        _text("provider", "asked for"),
        _text("node", "node"),
        _text("op", "op"),
        _text("on", "ran on"),
        _text("why", "why"),
        ("ms", "ms", _ms(rows, "ms")),
    ]
    return _table("fallback", rows, columns)


def matrix(report: Json) -> Table | None:
    """Compared models and ways of timing: median and speed-up of each; None when there was one way.

    What there is more of has the rows.
    """
    known = timings(report) if "models" in report else []
    if len(known) < 2:
        return None
    first, names = known[0].names[0], [n for n in model_names(report) if any(n in t.names for t in known)]
    places = figures.decimals(s.get("p50_ms") for t in known for s in t.stats)
    if len(names) > len(known):
        heads = [c for t in known for c in (Column(f"{t.title}: p50 ms"), Column("speed-up"))]
        rows = [(words(n), *(c for t in known for c in _timed(t, n, places))) for n in names]
        return Table("matrix", (Column("model", numeric=False), *heads), tuple(rows))
    heads = [Column("timed with", numeric=False)]
    for name in names:
        heads += [Column(f"{name}: p50 ms"), *([Column("speed-up")] if name != first else [])]
    rows = [
        (words(t.title), *(c for n in names for c in _timed(t, n, places)[: 1 if n == first else 2])) for t in known
    ]
    return Table("matrix", tuple(heads), tuple(rows))


def _timed(timing: Timing, name: str, places: int) -> tuple[Cell, Cell]:
    """A model's median and speed-up."""
    p50 = dict(zip(timing.names, timing.stats, strict=True)).get(name, {}).get("p50_ms")
    ratio = next((r.value for r in timing.ratios if r.name == name), None)
    return number(p50, figures.fixed(p50, places)), number(ratio, figures.fixed(ratio, 3))


def change(report: Json) -> Table | None:
    """What became better or worse since the comparison that was given as a baseline."""
    columns = [
        _text("model", "model"),
        _text("timed_with", "timed with"),
        _text("what", "what"),
        ("before", "last time", lambda v: figures.short(v, 4)),
        ("now", "now", lambda v: figures.short(v, 4)),
        ("worse_by", "worse by", figures.percent),
        _text("judged", ""),
    ]
    return _table("change", (report.get("change") or {}).get("rows"), columns)
