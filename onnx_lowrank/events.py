"""What the runtime's profile says of the nodes of a model: shapes, how often they ran, their time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

NUMBERED: Final = "onnx_lowrank_node_"
"""Start of the names of nodes that are called after their position."""


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
        name, _, suffix = event.get("name", "").rpartition("_kernel_time")
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
    """Milliseconds in a run, and operators, of every node as the runtime executes it, by its name."""
    times: dict[str, list[float]] = {}
    ops: dict[str, str] = {}
    for event in events:
        name, found, suffix = event.get("name", "").rpartition("_kernel_time")
        if event.get("cat") == "Node" and found and not suffix:
            times.setdefault(name, []).append(event["dur"] / 1e3)
            ops[name] = event.get("args", {}).get("op_name", "")
    return {name: _of_a_run(ms, runs) for name, ms in times.items()}, ops


def _of_a_run(ms: Sequence[float], runs: int) -> float:
    """Milliseconds in a run: the least of the warm ones, for others on the machine only ever add to it.

    A node in a loop runs several times in each; one in a branch that is not always taken counts with its share.
    """
    if len(ms) % runs or len(ms) == runs == 1:
        return float(np.median(ms)) * len(ms) / runs
    return float(np.reshape(ms, (runs, -1)).sum(axis=1)[1:].min())


def _shapes(entries: list[dict[str, list[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for entry in entries for shape in entry.values())
