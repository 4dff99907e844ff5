"""Where the nodes of a model really ran: which left the provider that was asked for, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Feed, profiled, provider_name

CPU: Final = "CPUExecutionProvider"
_SMALL = 64
"""Most entries of the integers that a graph computes shapes with."""

_COPIES: Final = ("MemcpyToHost", "MemcpyFromHost")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A node that ran elsewhere, or a copy between the host and the device.

    Attributes:
        on: full name of the provider that ran it.
        why: the reason in words.
        ms: its time in the profiled run.
    """

    node: str
    op: str
    on: str
    why: str
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return dataclasses.asdict(self)


def placed(
    model: Path | onnx.ModelProto, feed: Feed, folder: Path, *, provider: str, threads: int = 1
) -> tuple[Placement, ...]:
    """The nodes of a model as it is executed that do not run on its provider; none when that is the CPU."""
    wanted = provider_name(Provider.of(provider).chain("verify")[0][0])
    if wanted == CPU:
        return ()
    return placements(profiled(model, feed, folder, provider=provider, threads=threads, runs=1), wanted)


def placements(events: Iterable[Mapping[str, Any]], wanted: str) -> tuple[Placement, ...]:
    """The nodes in a profile that another provider ran, the slowest first; copies to and from the host too.

    Args:
        events: of the runtime's profile; where a node ran several times, its last run counts.
        wanted: full name of the provider that was asked for.
    """
    found: dict[str, Placement] = {}
    for event in events:
        name, kernel, suffix = event.get("name", "").rpartition("_kernel_time")
        if event.get("cat") != "Node" or not kernel or suffix:
            continue
        args = event["args"]
        on, op = str(args.get("provider", "")), str(args.get("op_name", ""))
        if op in _COPIES:
            why = "a tensor is copied between the host and the device"
        elif on and on != wanted:
            why = _why(args, wanted)
        else:
            continue
        found[name] = Placement(name, op, on, why, event["dur"] / 1e3)
    return tuple(sorted(found.values(), key=lambda p: -p.ms))


def _why(args: Mapping[str, Any], wanted: str) -> str:
    inputs, outputs = (_types(args.get(key, ())) for key in ("input_type_shape", "output_type_shape"))
    integers = [kind in ("int64", "int32", "bool") and size <= _SMALL for kind, size in outputs]
    if integers and all(integers):
        return "shape arithmetic, which the runtime keeps on the CPU"
    types = ", ".join(dict.fromkeys(kind for kind, _ in inputs)) or "no inputs"
    return f"{wanted.removesuffix('ExecutionProvider')} has no kernel for it with these types and attributes ({types})"


def _types(entries: Iterable[Mapping[str, Sequence[int]]]) -> list[tuple[str, int]]:
    """Type and number of entries of each tensor."""
    return [(kind, math.prod(shape)) for entry in entries for kind, shape in entry.items()]


def sentence(found: Sequence[Placement], provider: str) -> str | None:
    """A warning in one line; None where every node ran on the provider."""
    copies = sum(p.op in _COPIES for p in found)
    left = [p for p in found if p.op not in _COPIES]
    if not found:
        return None
    counts: dict[tuple[str, str], int] = {}
    for p in left:
        counts[(p.op, p.why)] = counts.get((p.op, p.why), 0) + 1
    listed = "; ".join(f"{n} × {op}: {why}" for (op, why), n in sorted(counts.items(), key=lambda c: -c[1])[:3])
    more = "" if len(counts) <= 3 else f"; and {len(counts) - 3} more kinds"
    moved = f"; {copies} copies between host and device" if copies else ""
    return f"{len(left)} nodes do not run on {provider}{' (' + listed + more + ')' if listed else ''}{moved}"
