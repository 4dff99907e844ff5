"""The command line: `onnx-lowrank COMMAND`. Parses, calls the library, shows what came back, sets the exit code."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from onnx_lowrank import __version__, output, pipeline, regressions, sidebyside, terminal
from onnx_lowrank.commands import cache, zoo
from onnx_lowrank.compare import compare as compare_models
from onnx_lowrank.errors import LowRankError, SettingsError
from onnx_lowrank.options import (
    BASELINE,
    CACHE,
    DATA,
    GOAL,
    HOW,
    INLINE,
    PATH,
    PRECISION,
    PREDICT,
    RESUME,
    SHOW,
    WHAT,
    WHERE,
    WHERE_EACH,
    WRITE,
    counts,
    numbers,
    options,
    split,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnx-lowrank")
def cli() -> None:
    """Make trained ONNX models faster with low-rank weights: measured on the saved file, within a stated loss.

    Exit codes: 0 done, 2 bad usage, model or data, 3 a --require-… not met, 4 verification failed, 130 interrupted.
    """


@cli.command()
@click.argument("model", type=PATH)
@options(*WRITE, DATA, *GOAL, *HOW, *WHAT, *WHERE, PRECISION, INLINE, CACHE, RESUME, PREDICT, *SHOW)
def optimize(model: Path, out: Path, data: tuple[str, ...], plan_out: Path | None, **given: Any) -> None:
    """Write a faster MODEL to OUT, or the original when nothing pays."""
    show, choices = split(given)
    output.check({**_written(out, show, choices), "--plan-out": plan_out}, [model], _read(data, choices))
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = pipeline.optimize(model, out, data=data or None, progress=tick, command=_command(), **choices)
    if plan_out is not None:
        output.write_text(plan_out, report.plan.to_json())
    _show_report(report, show)


@cli.command()
@click.argument("model", type=PATH)
@options(DATA, *GOAL, *HOW, *WHAT, *WHERE, PRECISION, INLINE, CACHE, RESUME, PREDICT, *SHOW)
def analyze(model: Path, data: tuple[str, ...], plan_out: Path | None, **given: Any) -> None:
    """Show what could be won in MODEL, site by site; writes no model."""
    show, choices = split(given)
    output.check({"--plan-out": plan_out, "--report": show["report_to"]}, [model], _read(data, choices))
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = pipeline.analyze(model, data=data or None, progress=tick, command=_command(), **choices)
    if plan_out is not None:
        output.write_text(plan_out, report.plan.to_json())
    _show_report(report, show, analysis=True)


@cli.command()
@click.argument("plan", type=PATH)
@click.argument("model", type=PATH)
@options(*WRITE, DATA, INLINE, CACHE, PREDICT, *SHOW)
def apply(plan: Path, model: Path, out: Path, data: tuple[str, ...], **given: Any) -> None:
    """Replay PLAN on MODEL, or on a retrained sibling of it."""
    show, choices = split(given)
    output.check(_written(out, show, choices), [model], [plan, *_read(data, choices)])
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = pipeline.apply(plan, model, out, data=data or None, progress=tick, command=_command(), **choices)
    _show_report(report, show)


@cli.command()
@click.argument("models", type=PATH, nargs=-1, required=True)
@options(DATA, *WHERE_EACH, *BASELINE, *SHOW)
def compare(models: tuple[Path, ...], data: tuple[str, ...], baseline: Path | None, **given: Any) -> None:
    """Compare latency and outputs of any ONNX MODELS with the first that works."""
    limit = given.pop("max_regression")
    if limit is not None and baseline is None:
        raise SettingsError("--max-regression needs --baseline; give an earlier .json of compare")
    show, choices = split(given)
    output.check({"--report": show["report_to"]}, models, data)
    earlier = regressions.read(baseline) if baseline is not None else None
    if "threads" in choices:
        choices["threads"] = counts(choices["threads"])
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = compare_models(models, data=data or None, progress=tick, command=_command(), **choices).to_dict()
    if earlier is not None:
        limit = regressions.DEFAULT if limit is None else limit
        report["change"] = regressions.change(report, earlier, against=str(baseline), limit=limit)
    if show["report_to"] is not None:
        output.write_report(show["report_to"], report)
    if show["as_json"]:
        click.echo(json.dumps(report))
    else:
        sidebyside.show(report, quiet=show["quiet"])
    if earlier is not None:
        regressions.require(report["change"])


@cli.command()
@click.argument("model", type=PATH)
@options(
    click.option("-o", "--output", "folder", type=PATH, required=True, help="Folder for the models."),
    click.option("--losses", default="0.002,0.005,0.01,0.02,0.05", show_default=True, help="Limits, a model each."),
    DATA, *HOW, *WHAT[:-1], *WHERE, PRECISION, INLINE, CACHE, RESUME, PREDICT, *SHOW,
)  # fmt: skip
def sweep(model: Path, folder: Path, losses: str, data: tuple[str, ...], **given: Any) -> None:
    """Write several models along the Pareto frontier of MODEL, from one calibration."""
    show, choices = split(given)
    output.check({"--report": show["report_to"]}, [model], _read(data, choices))
    if show["report_to"] is not None and show["report_to"].suffix != ".json":
        raise SettingsError(f"--report {show['report_to']}: several models are reported as .json; give such a name")
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        reports = pipeline.sweep(
            model, folder, losses=numbers(losses), data=data or None, progress=tick, command=_command(), **choices
        )
    table = [report.to_dict() for report in reports]
    if show["report_to"] is not None:
        output.write_text(show["report_to"], json.dumps(table, indent=1) + "\n")
    if show["as_json"]:
        click.echo(json.dumps(table))
    else:
        terminal.show_sweep(reports)


cli.add_command(cache)
cli.add_command(zoo)


def _show_report(report: Any, show: dict[str, Any], *, analysis: bool = False) -> None:
    if show["report_to"] is not None:
        output.write_report(show["report_to"], report.to_dict())
    if show["as_json"]:
        click.echo(json.dumps(report.to_dict()))
    else:
        terminal.show_report(report, quiet=show["quiet"], analysis=analysis)


def _written(out: Path, show: dict[str, Any], choices: dict[str, Any]) -> dict[str, Path | None]:
    return {"--output": out, "--keep-fp32": choices.get("keep_fp32"), "--report": show["report_to"]}


def _read(data: tuple[str, ...], choices: dict[str, Any]) -> list[str | Path]:
    return [*data, *([choices["cache"]] if "cache" in choices else [])]


def _command() -> str:
    return shlex.join(["onnx-lowrank", *sys.argv[1:]])


def _interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def run() -> int:
    """Parse and run; every error is one line and an exit code, a traceback only with -v."""
    for number in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, number) and signal.getsignal(getattr(signal, number)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, number), _interrupted)
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about values that are checked where they matter
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.NoArgsIsHelpError as fault:
        click.echo(fault.format_message())
        code = 2
    except click.ClickException as fault:
        click.echo(f"error: {fault.format_message()}", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was written", err=True)
        code = 130
    except LowRankError as fault:
        code = _report_error(str(fault), fault.exit_code, verbose)
    except BrokenPipeError:
        code = 1
    except MemoryError:
        code = _report_error("out of memory; give smaller samples (--shape, --data)", 2, verbose)
    except OSError as fault:
        code = _report_error(f"{fault.filename or 'file system'}: {fault.strerror or fault}", 2, verbose)
    except Exception as fault:
        what = f"internal error, {type(fault).__name__}: {fault}"
        code = _report_error(f"{what}; nothing was written; -v shows where, please report it", 2, verbose)
    return code


def _report_error(message: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
