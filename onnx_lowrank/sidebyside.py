"""What a person sees of a comparison: a table as wide as the terminal, what changed, and who could not be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from onnx_lowrank import breakdowns, figures, grids, verdicts
from onnx_lowrank.timings import Timing, model_names, timings
from onnx_lowrank.views import Column

Json = Mapping[str, Any]
_WIDE: Final = 130


def show(report: Json, *, quiet: bool = False, console: Console | None = None) -> None:
    """Tables of latency, outputs and change; one line for each model that failed; warnings; the verdict.

    Args:
        report: `Comparison.to_dict()`.
        quiet: the verdict and what failed only.
    """
    console = console or Console(highlight=False, markup=False)
    if not quiet:
        for timing in timings(report):
            console.print(_latency(report, timing, console.width))
            if timing.control:
                ends = figures.interval((timing.control.low, timing.control.high), 3)
                console.print(f"  {timing.title}, A/A control {ends}", style="dim", soft_wrap=True)
        _details(report, console)
    names = model_names(report)
    for name, row in zip(names, report["models"], strict=True):
        if row.get("error"):
            console.print(f"{name} could not be compared: {row['error']}", style="red", soft_wrap=True)
    for warning in verdicts.warnings(report):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    said = verdicts.verdict(report)
    style = "bold red" if said.tone == "bad" else "bold"
    console.print(f"{said.headline}. {said.figures}", style=style, soft_wrap=True)
    console.print(said.where, soft_wrap=True)


def _latency(report: Json, timing: Timing, width: int) -> Table:
    wide = width >= _WIDE
    rows = dict(zip(model_names(report), report["models"], strict=True))
    cold = {row.get("model"): row for row in report.get("cold") or ()}
    heads = ["model", "p50", "speed-up", "95 % interval", "loss", "file"]
    heads += ["p90", "runs/s", "parameters", "load", "first run", "memory"] if wide else []
    if "streams" in timing.stats[0]:
        heads.append(f"{timing.stats[0]['streams']} streams")
    ratios = {ratio.name: ratio for ratio in timing.ratios}
    places = figures.decimals(s.get("p50_ms") for s in timing.stats)
    lines = []
    for name, stats in zip(timing.names, timing.stats, strict=True):
        row, ratio, start = rows[name], ratios.get(name), cold.get(name) or {}
        cells = [
            name,
            f"{figures.fixed(stats.get('p50_ms'), places)} ms",
            f"{ratio.value:.3f}×" if ratio else "1",
            figures.interval((ratio.low, ratio.high), 3) if ratio else "",
            figures.short(row.get("loss")),
            figures.size(row.get("bytes")),
        ]
        if wide:
            cells += [figures.fixed(stats.get("p90_ms"), places), figures.short(stats.get("per_second"))]
            cells += [figures.count(row.get("parameters")), *(_ms(start.get(k)) for k in ("load_ms", "first_run_ms"))]
            cells.append(figures.size(start.get("peak_bytes")))
        if "streams" in timing.stats[0]:
            cells.append(f"{figures.short(stats.get('streams_per_second'))}/s")
        lines.append(cells)
    return grids.grid([Column(head, numeric=head != "model") for head in heads], lines, width)


def _ms(value: Any) -> str:
    return f"{figures.short(value)} ms" if figures.finite(value) else figures.MISSING


def _details(report: Json, console: Console) -> None:
    """Outputs and change, the columns that fit; all of them are in the report file."""
    accuracy, change = breakdowns.accuracy(report), breakdowns.change(report)
    narrow = ("model", "output", "absolute tolerance", "cosine", "SQNR dB", "same top 1")
    if accuracy is not None:
        console.print(grids.of(accuracy, console.width, None if console.width >= _WIDE + 40 else narrow))
    if change is not None:
        console.print(grids.of(change, console.width))
