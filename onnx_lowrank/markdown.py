"""The report as Markdown, for pull requests: a pure function of the report's JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from onnx_lowrank import breakdowns, figures, fourways, partcharts, verdicts, views
from onnx_lowrank.estimates import estimates
from onnx_lowrank.timings import is_analysis, model_names, timings
from onnx_lowrank.views import Table

_TOP: Final = 10


def markdown(report: Mapping[str, Any]) -> str:
    """Verdict, before and after, the top sites, warnings, environment; of `Report` or `Comparison.to_dict()`."""
    found = verdicts.verdict(report)
    parts = [f"## {_plain(found.headline)}", _plain(found.subject), _plain(found.figures), _plain(found.where)]
    parts += [f"> **Warning:** {_plain(warning)}" for warning in verdicts.warnings(report)]
    if "models" in report:
        named = zip(model_names(report), report["models"], strict=True)
        parts += [f"> **{_plain(n)} could not be compared:** {_plain(r['error'])}" for n, r in named if r.get("error")]
        parts.append(_table(verdicts.compared(report)))
        parts += _titled("Ways of timing", breakdowns.matrix(report))
        parts += _latency(report)
        parts += _titled(
            f"Since {_plain((report.get('change') or {}).get('against') or '')}", breakdowns.change(report)
        )
    else:
        if found.label != "analysis" and report.get("latency"):
            parts.append(_table(views.before_after(report)))
        if (four := fourways.precisions(report)) is not None:
            parts.append(_table(four))
        parts += _latency(report)
        if report.get("pareto"):
            parts += _folded("Pareto frontier: plans that were built and measured", views.pareto(report))
        parts += [*_sites(report), *map(_plain, estimates(report))]
    parts += _titled("Outputs", breakdowns.accuracy(report))
    parts += _titled("Fusions and data movement", breakdowns.fusions(report))
    parts += _folded("Cold start, each in a process of its own", breakdowns.cold(report))
    parts += _profile(report)
    rows = "\n".join(f"| {_plain(name)} | {_code(text)} |" for name, text in verdicts.environment(report))
    environment = f"| | |\n|:--|:--|\n{rows}"
    if report.get("command"):
        environment = f"{_code(report['command'])}\n\n{environment}"
    parts.append(f"<details><summary>Environment</summary>\n\n{environment}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _titled(title: str, table: Table | None) -> list[str]:
    return [f"### {title}", _table(table)] if table is not None else []


def _folded(title: str, table: Table | None, code: int | None = None, below: str = "") -> list[str]:
    """A table that is opened when it is asked for."""
    if table is None or not table.rows:
        return []
    text = "\n\n".join(part for part in (_table(table, code), below) if part)
    return [f"<details><summary>{_plain(title)}</summary>\n\n{text}\n\n</details>"]


def _latency(report: Mapping[str, Any]) -> list[str]:
    """Every statistic of every way of timing, and what noise alone looks like."""
    controls = [
        f"- A/A control, {_plain(t.title)}: {figures.interval((t.control.low, t.control.high), 3)}"
        for t in timings(report)
        if t.control
    ]
    return _folded("Latency: percentiles and A/A control", views.latency(report), below="\n".join(controls))


def _profile(report: Mapping[str, Any]) -> list[str]:
    """The nodes that took most of the time, of one model where several were compared."""
    name, known = partcharts.profiled(report), list(report.get("profile") or ())
    rows = [row for row in known if not name or row.get("model") == name]
    ranked = sorted(rows, key=lambda row: -max(row.get("before_ms") or 0.0, row.get("after_ms") or 0.0))
    table = breakdowns.profile({"profile": [{k: v for k, v in r.items() if k != "model"} for r in ranked[:_TOP]]})
    of = f" of {name}" if name else ""
    return _folded(f"Profile by node{of}: the slowest {min(_TOP, len(rows))} of {len(rows)}", table, code=0)


def _sites(report: Mapping[str, Any]) -> list[str]:
    known = list(report.get("sites") or ())
    if not known:
        return []
    top = [s for s in views.by_gain(report) if s.get("kind")][:_TOP] or views.by_gain(report)[:_TOP]
    table = views.sites(report, top)
    rewritten = sum(bool(s.get("kind")) for s in known)
    verb = "would be rewritten" if is_analysis(report) else "rewritten"
    head = f"### Sites\n\n{rewritten} of {len(known)} {verb}"
    if rewritten > len(top):
        head += f", the {len(top)} largest gains:"
    if prefix := views.common_prefix(report):
        head += f" (names begin with {_code(prefix)})"
    reasons = [f"- {n} × {_plain(reason)}" for reason, n in views.dense_reasons(report).items()]
    return [head, _table(table, code=0), "\n".join(["Kept dense:\n", *reasons]) if reasons else ""]


def _table(table: Table, code: int | None = None) -> str:
    """A pipe table; column `code` holds names of the model, which are shown literally."""
    lines = [
        "| " + " | ".join(_plain(c.name) for c in table.columns) + " |",
        "|" + "|".join("--:" if c.numeric else ":--" for c in table.columns) + "|",
    ]
    for row in table.rows:
        cells = [_code(c.text) if i == code else _plain(c.text) for i, c in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text without effect as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#@~&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span on one line; its fence is longer than any run of backticks inside."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}" if line else figures.MISSING
