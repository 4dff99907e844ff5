"""Options of the command line: what every command shares, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.providers import parse_options
from onnx_lowrank.settings import DEFAULT_KINDS, KIND_NAMES, METRIC_NAMES, POLICY_NAMES, PRECISION_NAMES, default_cache

PATH = click.Path(path_type=Path)


def options(*chosen: Callable[..., Any]) -> Callable[..., Any]:
    """Several click options as one decorator, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


DATA = click.option(
    "--data",
    "-d",
    multiple=True,
    metavar="SRC",
    help="x.npz, a folder, input:file.npy, loader.py:function. Repeatable. Default: synthetic inputs.",
)
PROVIDER_OPTION = click.option(
    "--provider-option",
    "provider_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Passed to the provider, such as use_tf32=0. Repeatable; latency tables belong to it too.",
)
WHERE = (
    click.option("--provider", default=None, help="Execution provider that will run the model [default: cpu]."),
    PROVIDER_OPTION,
    click.option(
        "--no-cpu-fallback",
        "cpu_fallback",
        flag_value=False,
        default=None,
        help="Refuse a model with nodes that the provider leaves to the CPU.",
    ),
    click.option("--threads", type=int, default=None, help="Intra-op threads of every timing [default: 1]."),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="NAME:1,3,224,224",
        help="Shape of synthetic inputs and timings; an input given twice is timed at both.",
    ),
    click.option("--samples", type=int, default=None, help="Read at most so many samples [default: 256]."),
    click.option("--seed", type=int, default=None, help="Seed of every random choice [default: 0]."),
    click.option(
        "--streams", type=int, default=None, help="Throughput with so many threads at once, too [default: 1]."
    ),
)
WHERE_EACH = (
    click.option("--provider", multiple=True, help="Execution provider; repeat it to time with each [default: cpu]."),
    click.option(
        "--threads",
        multiple=True,
        metavar="N,…",
        help="Intra-op threads; 1,2 or repeated times with each [default: 1].",
    ),
    PROVIDER_OPTION,
    *WHERE[-4:],
)
BASELINE = (
    click.option("--brief", is_flag=True, help="Latency and loss only: no outputs, cold starts and times by node."),
    click.option("--metric", default=None, help=f"{', '.join(METRIC_NAMES)} or file.py:function [default: relative]."),
    click.option("--baseline", type=PATH, help="An earlier .json of compare: show what changed, exit 3 when worse."),
    click.option(
        "--max-regression",
        type=click.FloatRange(min=0),
        default=None,
        help="What latency or loss may get worse by against --baseline [default: 0.05].",
    ),
)
WHAT = (
    click.option("--include", multiple=True, metavar="GLOB", help="Only nodes with such names. Repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No nodes with such names. Repeatable."),
    click.option(
        "--kinds",
        default=None,
        help=f"Ways to rewrite a site, of {','.join(KIND_NAMES)} [default: {','.join(DEFAULT_KINDS)}].",
    ),
    click.option("--plan-out", type=PATH, help="Write the plan (JSON), to be reviewed and replayed by apply."),
)
GOAL = (
    click.option(
        "--max-loss",
        type=float,
        default=None,
        help="Goal: the fastest within this relative squared error of the outputs [default: 0.01].",
    ),
    click.option("--speedup", type=float, default=None, help="Goal: the least loss at this measured speed-up."),
    click.option("--size", type=float, default=None, help="Goal: the least loss at this fraction of the weights."),
)
HOW = (
    click.option("--metric", default=None, help=f"{', '.join(METRIC_NAMES)} or file.py:function [default: relative]."),
    click.option("--max-drop", type=float, default=None, help="The limit for another --metric [default: 0.01]."),
    click.option(
        "--confidence",
        type=float,
        default=None,
        help="How sure the limit must hold on samples like the held-out ones [default: 0.95; 0.5: their mean].",
    ),
    click.option("--output-weight", "output_weights", multiple=True, metavar="NAME:2", help="Weight in the loss."),
    click.option(
        "--refit/--no-refit", default=None, help="Repair the factors with data after the choice [default: refit]."
    ),
    click.option(
        "--merge/--no-merge", default=None, help="Take exact neighbours into one node first [default: merge]."
    ),
    click.option("--policy", default=None, help=f"One of {', '.join(POLICY_NAMES)} [default: knapsack]."),
)
INLINE = click.option(
    "--inline-functions/--keep-functions",
    default=None,
    help="Rewrite inside model-local functions too, by inlining all of them [default: keep].",
)
PRECISION = click.option(
    "--precision",
    default=None,
    help=f"What will be deployed: {', '.join(PRECISION_NAMES)}; OUT is written in it [default: as the model is].",
)
CACHE = click.option(
    "--cache",
    type=PATH,
    default=None,
    help=f"Folder of the latency tables [default: {default_cache().name} in the user's cache], or an exported table.",
)
RESUME = click.option(
    "--resume", type=PATH, default=None, metavar="DIR", help="Keep finished stages in DIR; go on from the last one."
)
PREDICT = click.option(
    "--no-verify-latency",
    "verify_latency",
    flag_value=False,
    default=None,
    help="Plan for a machine that is not here, with its table (--cache FILE): the latency is predicted, not measured.",
)
SHOW = (
    click.option(
        "--report", "report_to", type=PATH, help="Write the report: .html, .json, .md, or raw samples as .csv."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print the verdict only."),
    click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error."),
)
WRITE = (
    click.option("-o", "--output", "out", type=PATH, required=True, help="Where the result goes; never partial."),
    click.option("--in-place", is_flag=True, help="Allow OUT to be MODEL."),
    click.option(
        "--external-data/--embedded-data",
        default=None,
        help="Weights beside the model or inside [default: as the model has them].",
    ),
    click.option(
        "--provenance/--no-provenance",
        default=None,
        help="New nodes say in their metadata where they come from [default: provenance].",
    ),
    click.option(
        "--keep-fp32", type=PATH, default=None, help="With --precision: the factored model in float32 goes here too."
    ),
    click.option("--require-speedup", type=float, default=None, help="Exit 3 and write nothing below this speed-up."),
)


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What concerns showing, and what the library takes; options that were not given are left out."""
    show = {name: given.pop(name) for name in ("report_to", "as_json", "quiet", "verbose")}
    choices = {name: value for name, value in given.items() if value is not None and value != ()}
    if "kinds" in choices:
        choices["kinds"] = tuple(kind.strip() for kind in choices["kinds"].split(",") if kind.strip())
    if "shapes" in choices:
        choices["shapes"] = _shape_sets([_shape(text) for text in choices["shapes"]])
    if "provider_options" in choices:
        choices["provider_options"] = parse_options(choices["provider_options"])
    if "output_weights" in choices:
        choices["output_weights"] = dict(_weight(text) for text in choices["output_weights"])
    return show, choices


def counts(given: tuple[str, ...]) -> list[int]:
    """`1,2` and `4` as numbers of threads.

    Raises:
        SettingsError: not such a list.
    """
    try:
        return [int(part) for text in given for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError(f"--threads '{','.join(given)}' is not a list of numbers such as 1,2") from None


def numbers(text: str) -> tuple[float, ...]:
    """`0.005,0.01` as numbers.

    Raises:
        SettingsError: not such a list.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingsError(f"--losses '{text}' is not a list of numbers such as 0.005,0.01") from None


def _weight(text: str) -> tuple[str, float]:
    name, colon, number = text.rpartition(":")
    try:
        return name, float(number if colon and name else "none")
    except ValueError:
        raise SettingsError(f"--output-weight '{text}' is not of the form NAME:2") from None


def _shape_sets(given: list[tuple[str, tuple[int, ...]]]) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The n-th shape of every input makes the n-th set; an input with fewer keeps its last one."""
    by_name: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in given:
        by_name.setdefault(name, []).append(shape)
    count = max(map(len, by_name.values()))
    return tuple({name: shapes[min(i, len(shapes) - 1)] for name, shapes in by_name.items()} for i in range(count))


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, colon, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(",") if size)
        if not colon or not name or any(size < 1 for size in shape):
            raise ValueError
    except ValueError:
        raise SettingsError(f"--shape '{text}' is not of the form NAME:1,3,224,224") from None
    return name, shape
