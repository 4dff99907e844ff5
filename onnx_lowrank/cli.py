"""The command line: `onnx-lowrank COMMAND`. Parses, calls the library, shows what came back, sets the exit code."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from onnx_lowrank import __version__, output, pipeline, terminal
from onnx_lowrank.compare import compare as compare_models
from onnx_lowrank.errors import LowRankError, SettingsError
from onnx_lowrank.settings import KIND_NAMES, default_cache

_PATH = click.Path(path_type=Path)


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_data = click.option(
    "--data",
    "-d",
    multiple=True,
    metavar="SRC",
    help="x.npz, a folder, input:file.npy, loader.py:function. Repeatable. Default: synthetic inputs.",
)
_where = (
    click.option("--provider", default=None, help="Execution provider that will run the model [default: cpu]."),
    click.option("--threads", type=int, default=None, help="Intra-op threads of every timing [default: 1]."),
    click.option("--shape", "shapes", multiple=True, metavar="NAME:1,3,224,224", help="Shape of a synthetic input."),
    click.option("--samples", type=int, default=None, help="Read at most so many samples [default: 256]."),
    click.option("--seed", type=int, default=None, help="Seed of every random choice [default: 0]."),
)
_what = (
    click.option(
        "--max-loss", type=float, default=None, help="Largest relative squared error of the outputs [default: 0.01]."
    ),
    click.option("--include", multiple=True, metavar="GLOB", help="Only nodes with such names. Repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No nodes with such names. Repeatable."),
    click.option("--kinds", default=None, help=f"Ways to rewrite a site [default: {','.join(KIND_NAMES)}]."),
    click.option("--plan-out", type=_PATH, help="Write the plan (JSON), to be reviewed and replayed by apply."),
)
_cache = click.option(
    "--cache",
    type=_PATH,
    default=None,
    help=f"Folder of the latency tables [default: {default_cache().name} in the user's cache].",
)
_show = (
    click.option("--report", "report_to", type=_PATH, help="Write the report: .html, .json or .md."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print the verdict only."),
    click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error."),
)
_write = (
    click.option("-o", "--output", "out", type=_PATH, required=True, help="Where the result goes; never partial."),
    click.option("--in-place", is_flag=True, help="Allow OUT to be MODEL."),
    click.option(
        "--external-data/--embedded-data",
        default=None,
        help="Weights beside the model or inside [default: as the model has them].",
    ),
    click.option("--require-speedup", type=float, default=None, help="Exit 3 and write nothing below this speed-up."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnx-lowrank")
def cli() -> None:
    """Make trained ONNX models faster with low-rank weights: measured on the saved file, within a stated loss.

    Exit codes: 0 done, 2 bad usage, model or data, 3 a --require-… not met, 4 verification failed, 130 interrupted.
    """


@cli.command()
@click.argument("model", type=_PATH)
@_options(*_write, _data, *_what, *_where, _cache, *_show)
def optimize(model: Path, out: Path, data: tuple[str, ...], plan_out: Path | None, **given: Any) -> None:
    """Write a faster MODEL to OUT, or the original when nothing pays."""
    show, choices = _split(given)
    output.check(plan_out, show["report_to"])
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = pipeline.optimize(model, out, data=data or None, progress=tick, command=_command(), **choices)
    if plan_out is not None:
        output.write_text(plan_out, report.plan.to_json())
    _show_report(report, show)


@cli.command()
@click.argument("model", type=_PATH)
@_options(_data, *_what, *_where, _cache, *_show)
def analyze(model: Path, data: tuple[str, ...], plan_out: Path | None, **given: Any) -> None:
    """Show what could be won in MODEL, site by site; writes no model."""
    show, choices = _split(given)
    output.check(plan_out, show["report_to"])
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = pipeline.analyze(model, data=data or None, progress=tick, command=_command(), **choices)
    if plan_out is not None:
        output.write_text(plan_out, report.plan.to_json())
    _show_report(report, show, analysis=True)


@cli.command()
@click.argument("plan", type=_PATH)
@click.argument("model", type=_PATH)
@_options(*_write, _data, _cache, *_show)
def apply(plan: Path, model: Path, out: Path, data: tuple[str, ...], **given: Any) -> None:
    """Replay PLAN on MODEL, or on a retrained sibling of it."""
    show, choices = _split(given)
    output.check(None, show["report_to"])
    with terminal.progress(show["quiet"] or show["as_json"]) as tick:
        report = pipeline.apply(plan, model, out, data=data or None, progress=tick, command=_command(), **choices)
    _show_report(report, show)


@cli.command()
@click.argument("models", type=_PATH, nargs=-1, required=True)
@_options(_data, *_where, *_show)
def compare(models: tuple[Path, ...], data: tuple[str, ...], **given: Any) -> None:
    """Compare latency and outputs of any ONNX MODELS with the first."""
    show, choices = _split(given)
    output.check(None, show["report_to"])
    comparison = compare_models(models, data=data or None, **choices)
    if show["report_to"] is not None:
        output.write_report(show["report_to"], comparison.to_dict())
    if show["as_json"]:
        click.echo(json.dumps(comparison.to_dict()))
    else:
        terminal.show_comparison(comparison)


@cli.group()
def zoo() -> None:
    """Real models to try it on, out of PyPI packages."""


@zoo.command("ls")
def zoo_ls() -> None:
    """List the models."""
    from onnx_lowrank.models import CATALOGUE

    terminal.show_catalogue(CATALOGUE)


@zoo.command("get")
@click.argument("name")
@click.option("-o", "--output", "folder", type=_PATH, default=Path("zoo"), show_default=True, help="Folder for it.")
def zoo_get(name: str, folder: Path) -> None:
    """Download model NAME and make its real calibration inputs."""
    from onnx_lowrank.models import get

    fetched = get(name, folder)
    click.echo(f"{fetched.model}\n{fetched.inputs}")
    click.echo(f"try: onnx-lowrank optimize {fetched.model} -o {fetched.model.stem}-lr.onnx --data {fetched.inputs}")


def _split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What concerns showing, and what the library takes; options that were not given are left out."""
    show = {name: given.pop(name) for name in ("report_to", "as_json", "quiet", "verbose")}
    choices = {name: value for name, value in given.items() if value is not None and value != ()}
    if "kinds" in choices:
        choices["kinds"] = tuple(kind.strip() for kind in choices["kinds"].split(",") if kind.strip())
    if "shapes" in choices:
        choices["shapes"] = dict(_shape(text) for text in choices["shapes"])
    return show, choices


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, colon, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(",") if size)
        if not colon or not name or any(size < 1 for size in shape):
            raise ValueError
    except ValueError:
        raise SettingsError(f"--shape '{text}' is not of the form NAME:1,3,224,224") from None
    return name, shape


def _show_report(report: Any, show: dict[str, Any], *, analysis: bool = False) -> None:
    if show["report_to"] is not None:
        output.write_report(show["report_to"], report.to_dict())
    if show["as_json"]:
        click.echo(json.dumps(report.to_dict()))
    else:
        terminal.show_report(report, quiet=show["quiet"], analysis=analysis)


def _command() -> str:
    return shlex.join(["onnx-lowrank", *sys.argv[1:]])


def _interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def run() -> int:
    """Parse and run; every error is one line and an exit code, a traceback only with -v."""
    signal.signal(signal.SIGTERM, _interrupted)
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
    return code


def _report_error(message: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
