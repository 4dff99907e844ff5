"""What a person sees: progress bars, one table, the verdict. Views of the report, no facts of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from onnx_lowrank.compare import Comparison
from onnx_lowrank.prepare import Progress as Tick
from onnx_lowrank.report import Report

_STAGES = {
    "read": "read the model, run one sample",
    "calibrate": "calibrate",
    "factor": "factor",
    "reference": "run the original on held-out samples",
    "measure": "measure ranks",
    "probe": "probe sensitivities",
    "decide": "build and measure plans",
    "verify": "verify the saved file",
    "report": "report",
}
_TOP = 12


@contextmanager
def progress(hidden: bool) -> Iterator[Tick]:
    """A bar per stage on stderr, with its time left; nothing when hidden or when stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=hidden or not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tick


def show_report(report: Report, *, quiet: bool, analysis: bool) -> None:
    """Before and after, the verdict, the sites with their choice, the rest counted by reason."""
    console = Console(highlight=False)
    if analysis:
        console.print(_prediction(report))
    if not quiet:
        if report:
            console.print(_before_after(report))
        if report.plan.decisions:
            console.print(_sites(report, everything=analysis))
        for reason, count in report.to_dict()["kept"].items():
            console.print(f"  {count} nodes kept: {reason}", style="dim")
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")
    if not analysis:
        console.print(report.verdict.sentence(), style="bold")
        if not quiet:
            console.print(f"wrote {report.after.path}")


def _prediction(report: Report) -> str:
    saved = sum((d.ms_before or 0) - (d.ms_after or 0) for d in report.plan.rewritten)
    whole = float(report.latency[0].before["p50_ms"]) if report.latency else 0.0
    share = f", {saved / whole:.0%} of the model's {whole:.1f} ms" if whole else ""
    return (
        f"{len(report.plan.rewritten)} of {len(report.plan.decisions)} sites would be rewritten within loss "
        f"{report.verdict.loss_limit:g}; their fragments alone save {saved:.2f} ms{share}"
    )


def _before_after(report: Report) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    timed = report.latency[0]
    before, after = float(timed.before["p50_ms"]), float(timed.after["p50_ms"])
    table.add_row(f"latency p50, {timed.threads} thread", f"{before:.2f} ms", f"{after:.2f} ms", f"{timed.ratio.value:.2f}×")  # fmt: skip  # noqa: E501
    for entry in report.latency[1:]:
        b, a = float(entry.before["p50_ms"]), float(entry.after["p50_ms"])
        table.add_row("latency p50, default threads", f"{b:.2f} ms", f"{a:.2f} ms", f"{entry.ratio.value:.2f}×")
    for name in ("bytes", "parameters", "macs"):
        old, new = getattr(report.before, name), getattr(report.after, name)
        label = {"bytes": "file", "macs": "multiply-adds"}.get(name, name)
        table.add_row(label, _short(old), _short(new), f"{new / old:.2f}" if old else "")
    table.add_row("loss", "0", f"{report.verdict.loss:.2g}", f"of {report.verdict.loss_limit:g}")
    return table


def _sites(report: Report, *, everything: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("site", "weight", "choice", "ms", "error"):
        table.add_column(name, justify="left" if name in ("site", "choice") else "right", overflow="fold")
    ordered = sorted(report.plan.decisions, key=lambda d: -((d.ms_before or 0) - (d.ms_after or d.ms_before or 0)))
    for d in ordered if everything else ordered[:_TOP]:
        choice = f"{d.kind} {d.rank}" if d.kind else f"dense: {d.why.value if d.why else ''}"
        ms = "" if d.ms_before is None else f"{d.ms_before:.3f}"
        ms += f" → {d.ms_after:.3f}" if d.kind and d.ms_after is not None else ""
        table.add_row(d.node, f"{d.shape[0]}×{d.shape[1]}", choice, ms, "" if d.error is None else f"{d.error:.4f}")
    if not everything and len(ordered) > _TOP:
        table.add_row(f"… {len(ordered) - _TOP} more", "", "", "", "")
    return table


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def show_comparison(comparison: Comparison) -> None:
    """One row a model, the first is the baseline."""
    table = Table(box=None, pad_edge=False)
    for name in ("model", "p50", "ratio", "95 % interval", "A/A", "file", "parameters", "loss"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    first = next((row.latency for row in comparison.rows if row.latency), None)
    for row in comparison.rows:
        timed = row.latency
        p50 = float((timed.after if timed else first.before)["p50_ms"]) if first else 0.0
        ratio = f"{timed.ratio.value:.3f}×" if timed else "1"
        interval = f"{timed.ratio.low:.3f}–{timed.ratio.high:.3f}" if timed else ""
        control = f"{timed.aa.low:.3f}–{timed.aa.high:.3f}" if timed else ""
        size = (_short(row.bytes), _short(row.parameters), f"{row.loss:.3g}")
        table.add_row(row.path, f"{p50:.2f} ms", ratio, interval, control, *size)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{comparison.samples} samples ({comparison.data}), {comparison.provider}, {comparison.threads} thread"
    )


def show_catalogue(entries: Iterable[Any]) -> None:
    """The zoo, a line each."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "package", "what it is"):
        table.add_column(name)
    for entry in entries:
        table.add_row(entry.name, f"{entry.package} {entry.version}", entry.description)
    Console(highlight=False).print(table)
