"""The report as Markdown, for pull requests: a pure function of the report's JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from onnx_lowrank import breakdowns, figures, fourways, verdicts, views
from onnx_lowrank.timings import is_analysis, model_names
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
        parts += _titled(
            f"Since {_plain((report.get('change') or {}).get('against') or '')}", breakdowns.change(report)
        )
    else:
        if found.label != "analysis" and report.get("latency"):
            parts.append(_table(views.before_after(report)))
        if (four := fourways.precisions(report)) is not None:
            parts.append(_table(four))
        parts += _sites(report)
    parts += _titled("Outputs", breakdowns.accuracy(report))
    parts += _titled("Fusions and data movement", breakdowns.fusions(report))
    rows = "\n".join(f"| {_plain(name)} | {_code(text)} |" for name, text in verdicts.environment(report))
    environment = f"| | |\n|:--|:--|\n{rows}"
    if report.get("command"):
        environment = f"{_code(report['command'])}\n\n{environment}"
    parts.append(f"<details><summary>Environment</summary>\n\n{environment}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _titled(title: str, table: Table | None) -> list[str]:
    return [f"### {title}", _table(table)] if table is not None else []


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
