"""What a person sees: progress bars, one table, the verdict. Views of the report, no facts of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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

from onnx_lowrank import figures, fourways, grids, sitelines
from onnx_lowrank.cache import Entry
from onnx_lowrank.fragment import size_text
from onnx_lowrank.latency import CONTROL, DENSE, noise_of
from onnx_lowrank.prepare import Progress as Tick
from onnx_lowrank.report import Report
from onnx_lowrank.staircase import eligible

_STAGES = {
    "read": "read the model, run one sample",
    "calibrate": "calibrate",
    "weigh": "see which errors matter to later sites",
    "unfold": "fit to what sites read",
    "layers": "time hidden layers",
    "share": "time common factors",
    "factor": "factor",
    "reference": "run the original on held-out samples",
    "lower": "choose a way to the precision",
    "estimate": "errors of candidates",
    "measure": "measure ranks",
    "probe": "probe sensitivities",
    "decide": "build and measure plans",
    "refit": "repair the factors with data",
    "witness": "run the plan on all samples",
    "verify": "verify the saved file",
    "compare": "compare models",
    "race": "time models turn about",
    "report": "report",
}
_STAIRCASES = 6


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
            name, _, cost = stage.partition(": ")
            title = _STAGES.get(name, name) + (f"\n  {cost}" if cost else "")
            if name not in tasks:
                tasks[name] = bars.add_task(title, total=total)
            bars.update(tasks[name], description=title, completed=done, total=total)

        yield tick


def show_report(report: Report, *, quiet: bool, analysis: bool, console: Console | None = None) -> None:
    """Before and after, the sites with their choice, the rest counted by reason, the verdict, the command."""
    console = console or Console(highlight=False, markup=False)
    if not quiet:
        if analysis:
            _show_staircases(console, report)
        if report.latency and (report or analysis):
            console.print(_before_after(report, analysis=analysis))
        if (four := fourways.precisions(report.to_dict())) is not None:
            console.print(grids.of(four, console.width))
        _show_sites(console, report, everything=analysis)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if analysis:
        console.print(_prospect(report), style="bold", soft_wrap=True)
    else:
        console.print(report.verdict.sentence(), style="bold", soft_wrap=True)
    if quiet:
        return
    if not analysis:
        console.print(f"wrote {report.after.path}", soft_wrap=True)
    if report.command:
        console.print(f"again: {report.command}", style="dim", soft_wrap=True)


def _show_sites(console: Console, report: Report, *, everything: bool) -> None:
    lines: list[str] = []
    if report.plan.decisions:
        table, lines = sitelines.table(report, console.width, everything=everything)
        console.print(table)
    lines += [f"  {count} nodes kept: {reason}" for reason, count in report.to_dict()["kept"].items()]
    for line in lines:
        console.print(line, style="dim", soft_wrap=True)


def _prospect(report: Report) -> str:
    plan, limit = report.plan, report.verdict.loss_limit
    within = f" within loss {limit:g}" if limit is not None else ""
    text = f"{len(plan.rewritten)} of {len(plan.decisions)} sites would be rewritten{within}"
    if report.verdict.latency == "predicted":
        return f"{text}: {report.verdict.reason}; nothing was timed."
    found = report.additivity
    if not found:
        return f"{text}."
    times = [found[f"{key}_ms"] for key in ("before", "predicted", "measured")]
    before, predicted, measured = (figures.fixed(ms, figures.decimals(times)) for ms in times)
    return f"{text}: {before} ms would become {predicted} ms as predicted from the sites, {measured} ms as measured."


def _before_after(report: Report, *, analysis: bool) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    places = figures.decimals(side["p50_ms"] for entry in report.latency for side in (entry.before, entry.after))
    for entry in report.latency:
        b, a = (figures.fixed(side["p50_ms"], places) for side in (entry.before, entry.after))
        threads = f"{entry.threads} thread{'s' if entry.threads > 1 else ''}" if entry.threads else "default threads"
        table.add_row(f"latency p50, {threads}", f"{b} ms", f"{a} ms", f"{entry.ratio.value:.2f}×")
    if report.additivity:
        before, predicted = report.additivity["before_ms"], report.additivity["predicted_ms"]
        b, a, ratio = figures.fixed(before, places), figures.fixed(predicted, places), f"{before / predicted:.2f}×"
        table.add_row("  predicted from the sites", f"{b} ms", f"{a} ms", ratio)
    if analysis:
        return table
    for name in ("bytes", "parameters", "macs"):
        old, new = getattr(report.before, name), getattr(report.after, name)
        label = {"bytes": "file", "macs": "multiply-adds"}.get(name, name)
        table.add_row(label, _short(old), _short(new), f"{new / old:.2f}" if old else "")
    limit = report.verdict.loss_limit
    table.add_row("loss", "0", f"{report.verdict.loss:.2g}", f"of {limit:g}" if limit is not None else "")
    return table


def _show_staircases(console: Console, report: Report) -> None:
    """Rank and milliseconds of the costliest geometries; ranks behind an edge are as slow as a larger one.

    The knapsack never chooses these, baselines may.
    """
    behind = "never chosen" if report.plan.policy == "knapsack" else "no faster than a larger rank"
    rows = [(key, row) for key, row in report.staircases.items() if DENSE in row and len(row) > 1]
    for key, row in sorted(rows, key=lambda item: -item[1][DENSE])[:_STAIRCASES]:
        places = figures.decimals(row.values())
        console.print(f"{key}: dense {figures.fixed(row[DENSE], places)} ms", style="bold", soft_wrap=True)
        for kind in dict.fromkeys(label.split()[0] for label in row if label not in (DENSE, CONTROL)):
            ms = {_ranks(label): time for label, time in row.items() if label.split()[0] == kind}
            edges = eligible(ms, noise_of(row))
            named = [(size, f"{size_text(*size)}:{figures.fixed(ms[size], places)}") for size in sorted(ms)]
            steps = " ".join(text for size, text in named if size in edges)
            others = " ".join(text for size, text in named if size not in edges)
            console.print(f"  {kind} {steps}" + (f"\n    {behind}: {others}" if others else ""), soft_wrap=True)


def _ranks(label: str) -> tuple[int, ...]:
    """The ranks in the label of a time, the last factor's first."""
    return tuple(int(rank) for rank in reversed(label.split()[1].split("x")))


def show_sweep(reports: Sequence[Report]) -> None:
    """One row a model along the frontier, then what was warned of, with the limits that it is about."""
    table = Table(box=None, pad_edge=False)
    for name in ("model", "limit", "loss", "speed-up", "95 % interval", "file"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for report in reports:
        v = report.verdict
        measured = v.latency == "measured"
        interval = v.status if not report else f"{v.speedup.low:.2f}–{v.speedup.high:.2f}" if measured else "predicted"
        limit = "" if v.loss_limit is None else f"{v.loss_limit:g}"
        row = (limit, f"{v.loss:.2g}", f"{v.speedup.value:.2f}×", interval, _short(report.after.bytes))
        table.add_row(report.after.path, *row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    about: dict[str, list[str]] = {}
    for report in reports:
        for warning in report.warnings:
            about.setdefault(warning, []).append(f"{report.verdict.loss_limit or 0:g}")
    for warning, limits in about.items():
        which = "" if len(limits) == len(reports) else f" at {', '.join(limits)}"
        console.print(f"warning{which}: {warning}", style="yellow", soft_wrap=True)


def show_cache(entries: Iterable[Entry], folder: Path) -> None:
    """The tables of a cache folder."""
    found = list(entries)
    console = Console(highlight=False, markup=False)
    if not found:
        console.print(f"no tables in {folder}")
    for entry in found:
        key = ", ".join(f"{name} {value}" for name, value in entry.environment.items())
        star = "*" if entry.here else " "
        console.print(f"{star} {entry.path.name}: {entry.times} times of {entry.geometries} geometries; {key}")


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def show_catalogue(entries: Iterable[Any]) -> None:
    """The zoo, a line each."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "package", "what it is"):
        table.add_column(name)
    for entry in entries:
        table.add_row(entry.name, f"{entry.package} {entry.version}", entry.description)
    Console(highlight=False, markup=False).print(table)
