"""A report's JSON as tables and sentences: what the HTML and the Markdown page both show."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from onnx_lowrank import figures
from onnx_lowrank.timings import timings

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is printed, the value that it is sorted by, and a bar's length (a fraction) where there is one."""

    text: str
    value: str | float | None = None
    bar: float | None = None
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A column's head, and what it says when pointed at; numbers stand to the right."""

    name: str
    numeric: bool = True
    help: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under columns; `key` names the table in tests and links."""

    key: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def number(value: Any, text: str, **more: Any) -> Cell:
    """A cell that prints `text` for a number of the JSON."""
    return Cell(text, value if figures.finite(value) else None, **more)


def words(value: Any, **more: Any) -> Cell:
    """A cell of text."""
    text = figures.MISSING if value in (None, "") else str(value)
    return Cell(text, text, **more)


def before_after(report: Json) -> Table:
    """The original and what was written: latency, file, parameters, multiply-adds, loss."""
    rows = []
    for timing in timings(report):
        old, new = (s.get("p50_ms") for s in timing.stats[:2])
        ratio = timing.ratios[0].value if timing.ratios else None
        cells = (number(old, f"{figures.short(old)} ms"), number(new, f"{figures.short(new)} ms"))
        rows.append((words(f"latency p50, {timing.title}"), *cells, number(ratio, figures.ratio(ratio))))
    old_facts, new_facts = ((report.get("model") or {}).get(side) or {} for side in ("before", "after"))
    for key, name, text in _FACTS:
        old, new = old_facts.get(key), new_facts.get(key)
        ratio = new / old if figures.finite(old) and figures.finite(new) and old else None
        rows.append((words(name), number(old, text(old)), number(new, text(new)), number(ratio, figures.fixed(ratio, 2))))  # fmt: skip  # noqa: E501
    verdict = report.get("verdict") or {}
    loss, limit = verdict.get("loss"), verdict.get("loss_limit")
    rows.append((words("loss"), number(0, "0"), number(loss, figures.short(loss, 2)), number(limit, f"of {figures.short(limit, 1)}")))  # fmt: skip  # noqa: E501
    columns = (Column("", numeric=False), Column("before"), Column("after"), Column("ratio"))
    return Table("before-after", columns, tuple(rows))


_FACTS = (
    ("bytes", "file", figures.size),
    ("parameters", "parameters", figures.count),
    ("macs", "multiply-adds", figures.count),
)


def latency(report: Json) -> Table:
    """A row for each model and way of timing; every statistic that occurs has its column."""
    known = timings(report)
    keys: dict[str, None] = {}
    for timing in known:
        for stats in timing.stats:
            keys |= dict.fromkeys(k for k, v in stats.items() if figures.finite(v))
    decimals = {k: figures.decimals(s.get(k) for t in known for s in t.stats) if k.endswith("_ms") else 0 for k in keys}
    rows = []
    for timing in known:
        speedups = {s.name: s for s in timing.ratios}
        for name, stats in zip(timing.names, timing.stats, strict=True):
            found = speedups.get(name)
            cells = [number(stats.get(k), _statistic_text(k, stats.get(k), decimals[k])) for k in keys]
            value = found.value if found else None
            ends = figures.interval((found.low, found.high), 3) if found else figures.MISSING
            rows.append(
                (
                    words(timing.title),
                    words(name),
                    number(value, figures.fixed(value, 3)),
                    number(found and found.low, ends),
                    *cells,
                )
            )
    columns = (Column("timed with", numeric=False), Column("model", numeric=False))
    numbers = (Column("speed-up"), Column("95 % interval"), *(Column(_statistic(k)) for k in keys))
    return Table("latency", (*columns, *numbers), tuple(rows))


def _statistic_text(key: str, value: Any, decimals: int) -> str:
    return figures.size(value) if key.endswith("_bytes") else figures.fixed(value, decimals)


def _statistic(key: str) -> str:
    return (key.removesuffix("_ms") + " ms" if key.endswith("_ms") else key).replace("_", " ")


def pareto(report: Json) -> Table:
    """The plans that were built and measured on the way."""
    points = report.get("pareto") or ()
    chosen, limit = chosen_point(report), (report.get("verdict") or {}).get("loss_limit")
    decimals = figures.decimals(p.get("ms") for p in points)
    rows = []
    for point in points:
        loss = point.get("loss")
        fits = figures.finite(loss) and figures.finite(limit) and loss <= limit
        note = "chosen" if point is chosen else "within the limit" if fits else "too much loss"
        rows.append(
            (
                number(point.get("rewritten"), figures.fixed(point.get("rewritten"), 0)),
                number(point.get("ms"), figures.fixed(point.get("ms"), decimals)),
                number(point.get("predicted"), figures.loss(point.get("predicted"))),
                number(loss, figures.loss(loss)),
                words(note, strong=point is chosen),
            )
        )
    names = ("rewritten", "sites ms", "predicted", "measured")
    return Table("pareto", (*(Column(n) for n in names), Column("", numeric=False)), tuple(rows))


def chosen_point(report: Json) -> Json | None:
    """The measured plan that was taken: marked `chosen`, or the one whose sites take as long as the decided ones."""
    points: list[Json] = list(report.get("pareto") or ())
    decided = [s for s in report.get("sites") or () if s.get("kind")]
    if marked := [p for p in points if p.get("chosen")]:
        return marked[0]
    total = sum(s.get("ms_after") or s.get("ms_before") or 0.0 for s in report.get("sites") or ())
    same = [p for p in points if figures.finite(p.get("ms")) and abs(p["ms"] - total) <= 1e-9 * max(total, 1.0)]
    return next((p for p in reversed(same) if p.get("rewritten") == len(decided) > 0), None)


def sites(report: Json, rows: Iterable[Json] | None = None) -> Table:
    """Every site with its choice, or the reason why it was kept."""
    known = list(report.get("sites") or ()) if rows is None else list(rows)
    (parts, basis), prefix = shares(report), common_prefix(report)
    times = figures.decimals(v for s in known for v in (s.get("ms_before"), s.get("ms_after")))
    largest = max(parts.values(), default=0.0)
    with_loss = any(figures.finite(s.get("loss")) for s in known)
    with_reason = any(site.get("reason") for site in known)
    with_spectrum = any(site.get("spectrum") for site in known)
    body = []
    for site in known:
        old, new, shape = site.get("ms_before"), site.get("ms_after"), site.get("shape") or []
        share = parts.get(str(site.get("node")))
        bar = share / largest if share is not None and largest else None
        body.append(
            (
                words(str(site.get("node", "")).removeprefix(prefix)),
                words(site.get("op")),
                Cell(figures.dims(shape), _product(shape)),
                *([words(_ranks(site))] if with_spectrum else []),
                words(choice(site), strong=bool(site.get("kind"))),
                number(share, figures.percent(share), bar=bar),
                number(old, figures.fixed(old, times)),
                number(new, figures.fixed(new, times)),
                number(saved(site), figures.fixed(saved(site), times)),
                number(site.get("error"), figures.loss(site.get("error"))),
                *([number(site.get("loss"), figures.loss(site.get("loss")))] if with_loss else []),
                *([Cell(str(site.get("reason") or ""), site.get("reason"))] if with_reason else []),
            )
        )
    numbers = ("share", "before ms", "after ms", "saved ms", "error", *(["loss"] if with_loss else []))
    spectrum = [Column("spectrum", numeric=False, help=_SPECTRUM)] if with_spectrum else []
    columns = (Column("site", False), Column("op", False), Column("weight"), *spectrum, Column("choice", False))
    heads = (Column(n, help=basis if n == "share" else "") for n in numbers)
    last = [Column("kept because", numeric=False)] if with_reason else []
    return Table("sites", (*columns, *heads, *last), tuple(body))


def _ranks(site: Json) -> str:
    return " · ".join(figures.fixed(rank, 0) for _, rank in site.get("spectrum") or ())


_SPECTRUM = "Spectrum: the ranks that leave at most 10, 1 and 0.1 % of the site's output, in the metric of the data."
_PROFILED = "Share: the site's part of the time of all nodes in the runtime's own profile of the original."
_ALONE = "Share: the site's fragment alone, over the time of the model or of all fragments, whichever is longer."


def shares(report: Json) -> tuple[dict[str, float], str]:
    """What part of the model's time each site takes, by its name, and how that is known.

    Out of the profile where there is one: there a site runs as in the model, fused. A fragment alone can take longer.
    """
    nodes = {r.get("node"): r for r in report.get("profile") or () if figures.finite(r.get("before_ms"))}
    total = sum(float(r["before_ms"]) for r in nodes.values() if r.get("op") not in ("If", "Loop", "Scan"))
    known = list(report.get("sites") or ())
    found = {}
    for site in known:
        times = [nodes[n]["before_ms"] for n in (site.get("node"), *(site.get("tied") or ())) if n in nodes]
        if times and total:
            found[str(site.get("node"))] = sum(times) / total
    if found:
        return found, _PROFILED
    alone = {str(s.get("node")): float(s["ms_before"]) for s in known if figures.finite(s.get("ms_before"))}
    whole = model_ms(report)
    longest = max(whole, sum(alone.values())) if whole else None
    return ({name: ms / longest for name, ms in alone.items()} if longest else {}), _ALONE


def dense_reasons(report: Json) -> dict[str, int]:
    """Why sites stay dense, the most frequent reason first."""
    counts: dict[str, int] = {}
    for site in report.get("sites") or ():
        if not site.get("kind") and site.get("reason"):
            counts[site["reason"]] = counts.get(site["reason"], 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def choice(site: Json) -> str:
    """Kind and rank (both ranks of a kind that has two, the inner one first), or dense."""
    inner = f"{site['inner']}x" if site.get("inner") else ""
    return f"{site['kind']} {inner}{site.get('rank')}" if site.get("kind") else "dense"


def saved(site: Json) -> float | None:
    """Milliseconds that a site gained, measured on the fragment alone."""
    old, new = site.get("ms_before"), site.get("ms_after")
    return float(old - new) if figures.finite(old) and figures.finite(new) else None


def by_gain(report: Json) -> list[Json]:
    """Sites, those that gained most first, then the slowest."""
    known = list(report.get("sites") or ())
    return sorted(known, key=lambda s: (-(saved(s) or 0.0), -(s.get("ms_before") or 0.0)))


def model_ms(report: Json) -> float | None:
    """Median of the original, which the sites' shares refer to."""
    value = next((t.stats[0].get("p50_ms") for t in timings(report)), None)
    return float(value) if figures.finite(value) and value > 0 else None


def common_prefix(report: Json) -> str:
    """What all names of sites begin with, up to a separator; not worth naming below eight characters."""
    names = [str(s.get("node", "")) for s in report.get("sites") or ()]
    if len(names) < 2:
        return ""
    # By characters and not by path: names of nodes without slashes are separated by dots.
    shared = os.path.commonprefix(names)  # noqa: RUF071
    cut = (shared.rfind("/") if "/" in shared else shared.rfind(".")) + 1
    return shared[:cut] if cut >= 8 else ""


def _product(shape: Iterable[int]) -> float:
    total = 1.0
    for n in shape:
        total *= n
    return total


def listed(key: str, rows: Any) -> Table | None:
    """A table of a list of flat objects: a column for each key, numbers to the right."""
    flat = [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in rows or ()]
    names = list(dict.fromkeys(name for row in flat for name in row))
    if not names:
        return None
    numeric = {n: all(row.get(n) is None or figures.finite(row[n]) for row in flat) for n in names}
    body = tuple(
        tuple(number(r.get(n), figures.short(r.get(n), 4)) if numeric[n] else words(r.get(n)) for n in names)
        for r in flat
    )
    return Table(key, tuple(Column(_statistic(n), numeric[n]) for n in names), body)
