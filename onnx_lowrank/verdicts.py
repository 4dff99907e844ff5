"""The verdict of a report or a comparison in words, with what a reader has to know before believing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from onnx_lowrank import figures, regressions
from onnx_lowrank.timings import Timing, how, is_analysis, model_names, shapes, timings
from onnx_lowrank.views import Column, Table, model_ms, number, saved, words

Json = Mapping[str, Any]
_INPUTS = 3  # named in the verdict; the rest are counted


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Headline, one line of figures, and one that says where and with which data they were measured.

    `tone` is `good`, `plain` or `bad`; `subject` names the files.
    """

    label: str
    tone: str
    subject: str
    headline: str
    figures: str
    where: str


def verdict(report: Json) -> Verdict:
    """What the page says first."""
    if "models" in report:
        return _of_comparison(report)
    model = report.get("model") or {}
    old, new = (_name((model.get(side) or {}).get("path")) for side in ("before", "after"))
    found, where = report.get("verdict") or {}, _where(report)
    limit = figures.short(found.get("loss_limit"), 1)
    if is_analysis(report):
        headline = str(found.get("reason")).capitalize()
        line = f"{_fragments(report)} Loss limit {limit}. No model was written."
        return Verdict("analysis", "plain", old, headline, line, where)
    if report.get("status") != "optimized":
        reason = str(found.get("reason") or figures.MISSING)
        return Verdict("unchanged", "plain", old, "Unchanged", f"{reason[:1].upper()}{reason[1:]}.", where)
    ends = figures.interval(found.get("speedup_ci"))
    upper = found.get("loss_upper")
    below = f" (95 %: below {figures.short(upper, 2)})" if figures.finite(upper) else ""
    loss = f"loss {figures.short(found.get('loss'), 2)} of {limit} allowed{below}"
    made = f" in {str(found.get('precision')).split()[0]}" if report.get("precisions") else ""
    headline = f"{figures.ratio(found.get('speedup'))} faster{made}"
    if found.get("latency") == "predicted":
        source = f"the table of {found['machine']}" if found.get("machine") else "the plan"
        line = f"predicted from {source}, not measured · {loss}"
        return Verdict("predicted", "plain", f"{old} → {new}", headline, line, where)
    return Verdict("optimized", "good", f"{old} → {new}", headline, f"95 % interval {ends} · {loss}", where)


def _fragments(report: Json) -> str:
    total = sum(saved(s) or 0.0 for s in report.get("sites") or () if s.get("kind"))
    whole = model_ms(report)
    share = f", {figures.percent(total / whole)} of the model's {figures.short(whole)} ms" if whole else ""
    return f"Their fragments alone save {figures.short(total)} ms{share}."


def _where(report: Json) -> str:
    found, environment = report.get("verdict") or {}, report.get("environment") or {}
    threads = next((f", {how(e.get('threads'))}" for e in report.get("latency") or ()), "")
    machine = ", ".join(str(environment[k]) for k in ("processor", "runtime") if environment.get(k))
    head = " · ".join(part for part in (f"{found.get('provider')}{threads}", machine) if part)
    data = _data(found.get("samples"), found.get("data"), "held-out samples")
    return f"{head} · loss measured on {data}" if report.get("status") == "optimized" else f"{head} · {data}"


def _data(samples: Any, data: Any, name: str) -> str:
    known = "synthetic inputs, not real data" if data == "synthetic" else name
    return f"{figures.fixed(samples, 0)} {known}"


def _name(path: Any) -> str:
    return str(path or figures.MISSING).replace("\\", "/").rpartition("/")[2]


def metric_of(report: Json) -> str:
    """What the loss is."""
    return str((report.get("verdict") or report).get("metric") or "relative")


def _of_comparison(report: Json) -> Verdict:
    timed = timings(report)
    tone, headline, line = _fastest(report, timed)
    if worse := regressions.bad(report.get("change") or {}):
        against = _name(report["change"].get("against"))
        more = f", and {len(worse) - 1} more" if len(worse) > 1 else ""
        line = " · ".join(part for part in (headline, line) if part)
        tone, headline = "bad", f"Worse than {against}: {regressions.said(worse[0], briefly=True)}{more}"
    return Verdict("comparison", tone, " · ".join(model_names(report)), headline, line, _compared_where(report, timed))


def _fastest(report: Json, timed: list[Timing]) -> tuple[str, str, str]:
    """Tone, headline and figures of the first way of timing, with the loss of the model that is named."""
    if not timed or not timed[0].ratios:
        return "plain", "No two models could be timed", ""
    names, best = model_names(report), max(timed[0].ratios, key=lambda r: r.value)
    first = timed[0].names[0]
    line = f"{best.name}: {best.text}"
    if best.low > 1:
        tone, headline = "good", f"{best.name}: {figures.ratio(best.value)} faster"
        line = f"95 % interval {figures.interval((best.low, best.high))}"
    elif best.high < 1:
        tone, headline = "plain", f"{first} is the fastest"
        line = f"Next {best.name} at {best.text}"
    else:
        tone, headline = "plain", "No speed difference shown"
    loss = dict(zip(names, (row.get("loss") for row in report["models"]), strict=True)).get(best.name)
    if figures.finite(loss):
        line += f" · its outputs differ from those of {first} by {figures.short(loss, 2)} ({metric_of(report)})"
    return tone, headline, line


def _compared_where(report: Json, timed: list[Timing]) -> str:
    """Provider, threads and shapes of the first way of timing, how many more there are, the machine and the data."""
    environment = report.get("environment") or {}
    machine = ", ".join(str(environment[k]) for k in ("processor", "runtime") if environment.get(k))
    way = [str(report.get("provider")), how(report.get("threads"))]
    way += [shapes(dict(timed[0].way.shape), _INPUTS)] if timed else []
    ways = f", the first of {len(timed)} ways" if len(timed) > 1 else ""
    data = _data(report.get("samples"), report.get("data"), "samples")
    return f"{', '.join(part for part in way if part)}{ways} · {machine} · loss measured on {data}"


def warnings(report: Json) -> list[str]:
    """The run's warnings, and what the figures themselves give cause to say."""
    found = [str(w) for w in report.get("warnings") or ()]
    if (report.get("verdict") or report).get("data") == "synthetic" and not any("synthetic" in w for w in found):
        found.append("the loss was measured on synthetic inputs, not on real data")
    found += [str(w) for w in (report.get("change") or {}).get("warnings") or ()]
    return found


def compared(report: Json) -> Table:
    """A row for each compared model; the first is the baseline."""
    timed = timings(report)
    stats = dict(zip(timed[0].names, timed[0].stats, strict=True)) if timed else {}
    ratios = {r.name: r for r in timed[0].ratios} if timed else {}
    decimals = figures.decimals(s.get("p50_ms") for s in stats.values())
    rows = []
    for name, row in zip(model_names(report), report["models"], strict=True):
        p50, ratio = stats.get(name, {}).get("p50_ms"), ratios.get(name)
        rows.append(
            (
                words(name),
                number(p50, figures.fixed(p50, decimals)),
                number(ratio and ratio.value, figures.fixed(ratio and ratio.value, 3)),
                number(ratio and ratio.low, figures.interval((ratio.low, ratio.high), 3) if ratio else figures.MISSING),
                number(row.get("bytes"), figures.size(row.get("bytes"))),
                number(row.get("parameters"), figures.count(row.get("parameters"))),
                number(row.get("loss"), figures.loss(row.get("loss"))),
            )
        )
    names = ("p50 ms", "speed-up", "95 % interval", "file", "parameters", "loss")
    return Table("models", (Column("model", numeric=False), *(Column(n) for n in names)), tuple(rows))


def _flat(facts: Json, head: str = "") -> Iterator[tuple[str, str]]:
    """Facts with those of a card one by one; lists have a table of their own."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key} ")
        elif not isinstance(value, list):
            yield f"{head}{key}", str(value)


def environment(report: Json) -> list[tuple[str, str]]:
    """Machine, versions, data and files, as name and text."""
    rows = list(_flat(report.get("environment") or {}))
    found = report.get("verdict") or report
    rows += [(key, str(found[key])) for key in ("provider", "precision", "data", "samples", "metric") if key in found]
    rows += [(key.replace("_", " "), str(value)) for key, value in (report.get("session") or {}).items()]
    for side in ("before", "after"):
        facts = (report.get("model") or {}).get(side) or {}
        rows += [(f"{side}, {key}", str(facts[key])) for key in ("path", "sha256") if facts.get(key)]
    for i, row in enumerate(report.get("models") or (), 1):
        rows.append((f"model {i}", str(row.get("path"))))
        rows += [(f"model {i}, sha256", str(row["sha256"]))] if row.get("sha256") else []
    return rows
