"""The report as one offline HTML file: a pure function of the report's JSON, which is kept inside."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Mapping
from importlib import resources
from typing import Any

from onnx_lowrank import breakdowns, charts, figures, fourways, partcharts, timings, tradeoffs, verdicts, views
from onnx_lowrank.errors import RuntimeMissing
from onnx_lowrank.estimates import estimates
from onnx_lowrank.verdicts import metric_of


def html(report: Mapping[str, Any]) -> str:
    """One file without a reference to the network, out of `Report.to_dict()` or `Comparison.to_dict()`.

    Raises:
        RuntimeMissing: jinja2 is not installed.
    """
    check()
    import jinja2
    from markupsafe import Markup, escape

    loader = jinja2.PackageLoader("onnx_lowrank")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    # Names of nodes may break after a slash, and nowhere else unless they must.
    environment.filters["breakable"] = lambda text: Markup(escape(text).replace("/", Markup("/<wbr>")))
    script = _text("report.js")
    parts = _comparison(report) if "models" in report else _report(report)
    drawn = {k: [Markup(c) for c in v if c] if isinstance(v, list) else Markup(v) for k, v in parts["charts"].items()}
    stairs = [(title, detail, Markup(chart)) for title, detail, chart in parts["staircases"]]
    return environment.get_template("report.html.j2").render(
        {**parts, "charts": drawn, "staircases": stairs},
        data=report,
        style=Markup(_text("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def check() -> None:
    """Refuse before the work is done.

    Raises:
        RuntimeMissing: jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise RuntimeMissing("an HTML report needs jinja2; install it: pip install 'onnx-lowrank[report]'")


def _text(name: str) -> str:
    return resources.files("onnx_lowrank").joinpath("templates", name).read_text(encoding="utf-8")


def _report(report: Mapping[str, Any]) -> dict[str, Any]:
    known, found = timings.timings(report), report.get("verdict") or {}
    measured = report.get("status") == "optimized" and figures.finite(found.get("loss"))
    limit = float(found["loss_limit"]) if figures.finite(found.get("loss_limit")) else None
    analysis = timings.is_analysis(report)
    return {
        **_common(report, known),
        "comparison": False,
        "analysis": analysis,
        "overview": None if analysis or not known else views.before_after(report),
        "pareto": views.pareto(report),
        "sites": views.sites(report, views.by_gain(report)),
        "share_words": views.shares(report)[1],
        "rewritten": any(site.get("kind") for site in report.get("sites") or ()),
        "prefix": views.common_prefix(report),
        "dense": views.dense_reasons(report),
        "kept": report.get("kept") or {},
        "loss": (figures.short(found.get("loss")), figures.short(limit, 1)) if measured else None,
        "staircases": tradeoffs.staircases(report),
        "estimates": estimates(report),
        "charts": {
            **_timed(report, known),
            "frontier": tradeoffs.frontier(report),
            "sites": charts.sites(report),
            "losses": charts.losses([("rewritten", float(found["loss"]))], limit, metric_of(report))
            if measured
            else "",
            "samples": partcharts.sample_losses([("rewritten", report.get("sample_losses") or ())], limit),
        },
    }


def _comparison(report: Mapping[str, Any]) -> dict[str, Any]:
    known = timings.timings(report)
    names = timings.model_names(report)
    rows = [(n, r["loss"]) for n, r in zip(names, report["models"], strict=True) if figures.finite(r.get("loss"))]
    first = names[report.get("baseline") or 0]
    p50 = dict(zip(known[0].names, (s.get("p50_ms") for s in known[0].stats), strict=True)) if known else {}
    points = [(n, float(p50[n] or 0), float(loss)) for n, loss in rows if figures.finite(p50.get(n))]
    return {
        **_common(report, known),
        "comparison": True,
        "analysis": False,
        "overview": verdicts.compared(report),
        "pareto": None,
        "sites": None,
        "share_words": "",
        "rewritten": False,
        "prefix": "",
        "dense": {},
        "kept": {},
        "loss": None,
        "staircases": [],
        "estimates": [],
        "charts": {
            **_timed(report, known),
            "frontier": tradeoffs.models(points),
            "sites": "",
            "losses": charts.losses([(n, float(v)) for n, v in rows if n != first], None, metric_of(report)),
            "samples": partcharts.sample_losses(_samples(report, names, first), None),
        },
    }


def _common(report: Mapping[str, Any], known: list[timings.Timing]) -> dict[str, Any]:
    return {
        "verdict": verdicts.verdict(report),
        "warnings": verdicts.warnings(report),
        "timings": known,
        "metric": metric_of(report),
        "metric_words": charts.LOSSES.get(metric_of(report), metric_of(report)),
        "latency": views.latency(report),
        "precisions": fourways.precisions(report),
        "accuracy": breakdowns.accuracy(report),
        "cold": breakdowns.cold(report),
        "profile": breakdowns.profile(report),
        "profiled": partcharts.profiled(report),
        "fusions": breakdowns.fusions(report),
        "fallback": breakdowns.fallback(report),
        "matrix": breakdowns.matrix(report),
        "change": breakdowns.change(report),
        "against": (report.get("change") or {}).get("against"),
        "errors": [(n, r["error"]) for n, r in _failed(report)],
        "environment": verdicts.environment(report),
        "seconds": report.get("seconds") or {},
        "command": report.get("command") or "",
    }


def _samples(report: Mapping[str, Any], names: list[str], first: str) -> list[tuple[str, Any]]:
    rows = zip(names, report["models"], strict=True)
    return [(name, row["sample_losses"]) for name, row in rows if row.get("sample_losses") and name != first]


def _failed(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    if "models" not in report:
        return []
    named = zip(timings.model_names(report), report["models"], strict=True)
    return [(name, row) for name, row in named if row.get("error")]


def _timed(report: Mapping[str, Any], known: list[timings.Timing]) -> dict[str, Any]:
    return {
        "distributions": [charts.distribution(t) for t in known],
        "intervals": charts.intervals(known),
        "profile": partcharts.nodes(report),
    }
