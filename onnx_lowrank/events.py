"""What the runtime's profile says of the nodes of a model: shapes, how often they ran, their time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

NUMBERED: Final = "onnx_lowrank_node_"
"""Start of the names of nodes that are called after their position."""

_KERNEL: Final = "_kernel_time"
_HOLDERS: Final = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class NodeRun:
    """One node in a profiled run: shapes of its inputs and outputs, how often it ran, its time."""

    op: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    count: int
    ms: float


def node_runs(events: list[dict[str, Any]]) -> dict[int, NodeRun]:
    """The nodes of the main graph by position, in a model whose nodes are named after it."""
    found: dict[int, NodeRun] = {}
    for event in events:
        name, _, suffix = event.get("name", "").rpartition(_KERNEL)
        number = name.removeprefix(NUMBERED)
        if event.get("cat") != "Node" or suffix or number == name or not number.isdigit():
            continue  # a node of a body, or one that the runtime made (`…/duplicated`)
        position, args = int(number), event["args"]
        earlier = found.get(position)
        found[position] = NodeRun(
            op=args["op_name"],
            input_shapes=_shapes(args["input_type_shape"]),
            output_shapes=_shapes(args["output_type_shape"]),
            count=1 + (earlier.count if earlier else 0),
            ms=event["dur"] / 1e3 + (earlier.ms if earlier else 0.0),
        )
    return found


def kernel_times(events: Iterable[Mapping[str, Any]], runs: int) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds in a run, and operators, of every node as the runtime executes it, by its name.

    The nodes of a body count for themselves, not for the If, Loop or Scan around them as well: an If may hold all of
    a model, one in the other.
    """
    kernels = [e for e in events if e.get("cat") == "Node" and e.get("name", "").endswith(_KERNEL)]
    times: dict[str, list[float]] = {}
    ops: dict[str, str] = {}
    for event, us in _own_times(kernels):
        name = event["name"].removesuffix(_KERNEL)
        times.setdefault(name, []).append(us / 1e3)
        ops[name] = event["args"]["op_name"]
    return {name: _of_a_run(ms, runs) for name, ms in times.items()}, ops


def _own_times(kernels: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """Every event in the order of the starts, with its microseconds less those of the events inside it."""
    bodies_last = reversed(list(kernels))  # the runtime writes an event where it ends
    ordered = sorted(bodies_last, key=lambda event: (event["ts"], -event["dur"]))
    own = [event["dur"] for event in ordered]
    around: list[int] = []
    for index, event in enumerate(ordered):
        while around and ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        if event["args"]["op_name"] in _HOLDERS:
            around.append(index)
    return list(zip(ordered, own, strict=True))


def _of_a_run(ms: Sequence[float], runs: int) -> float:
    """Milliseconds in a run: the least of the warm ones, for others on the machine only ever add to it.

    A node in a loop runs several times in each; one in a branch that is not always taken counts with its share.
    """
    if len(ms) % runs or len(ms) == runs == 1:
        return float(np.median(ms)) * len(ms) / runs
    return float(np.reshape(ms, (runs, -1)).sum(axis=1)[1:].min())


def _shapes(entries: list[dict[str, list[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for entry in entries for shape in entry.values())
