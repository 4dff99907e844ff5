"""Where the time goes inside two models, node by node, and what the runtime made of their graphs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnx_lowrank.errors import ModelError
from onnx_lowrank.events import kernel_times
from onnx_lowrank.runtime import Feed, Session
from onnx_lowrank.scratch import scratch

MOST_BYTES = 1_500_000_000
"""A larger model cannot be handed to the runtime out of memory, and is not profiled."""

SITE, PASS = "onnx_lowrank.site", "onnx_lowrank.pass"
_FUSED = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Add", "Sum", "Mul")
_BLOCKED = ("Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
_MOVES = ("Transpose", "Cast", "MemcpyToHost", "MemcpyFromHost", "ReorderInput", "ReorderOutput")
_MADE = "made by the runtime"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the runtime ran: milliseconds (least of some runs) and operator by node, and the model's own operators."""

    ms: Mapping[str, float]
    ops: Mapping[str, str]
    owners: Mapping[str, str]
    own: Mapping[str, str]
    """Operator by name of the model's own nodes, in the order of the graph; those of bodies come last."""
    inner: frozenset[str] = frozenset()
    """Operators of bodies, whose nodes may have no name."""

    def by_owner(self) -> dict[str, tuple[float, list[str]]]:
        """Milliseconds and operators by the node of the original that they stand for, else by operator."""
        found: dict[str, tuple[float, list[str]]] = {}
        for name, ms in self.ms.items():
            owner = owner_of(name, self.owners) or self.ops[name]
            total, ops = found.get(owner, (0.0, []))
            found[owner] = (total + ms, [*ops, self.ops[name]])
        return found


def profile_model(
    model: onnx.ModelProto,
    feed: Feed,
    folder: Path,
    *,
    provider: str,
    threads: int,
    runs: int = 7,
    seconds: float = 4.0,
) -> Profile:
    """Run a model some times under the runtime's profiler, optimised as ever; at least twice after the first.

    Raises:
        ModelError: it fails, or is too large.
    """
    if model.ByteSize() > MOST_BYTES:
        raise ModelError(f"too large to be profiled ({model.ByteSize() / 1e9:.1f} GB)")
    named = with_names(model)
    with scratch() as place:
        prefix = str(place / "profile")
        session = Session(
            named, provider=provider, threads=threads, folder=folder, spin=True, profile_to=prefix, purpose="verify"
        )
        end, made = time.perf_counter() + seconds, 0
        while made <= runs and (made < 3 or time.perf_counter() < end):
            session.run(feed)
            made += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace"))
    ms, ops = kernel_times(events, made)
    inner = {node.name: node.op_type for node in _inner(named) if node.name}
    known = {**{name: name for name in inner}, **owners(named)}
    own = {**{node.name: node.op_type for node in named.graph.node}, **inner}
    return Profile(ms, ops, known, own, frozenset(node.op_type for node in _inner(named)))


def _inner(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes of all bodies, of If, Loop, Scan and functions."""
    queue = list(model.graph.node)
    for function in model.functions:
        queue += function.node
        yield from function.node
    while queue:
        for attribute in queue.pop().attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.node
                queue += graph.node


def with_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy in which every node of the main graph has a name of its own."""
    names = [node.name for node in model.graph.node]
    if all(names) and len(set(names)) == len(names):
        return model
    copy, taken = onnx.ModelProto(), set(names)
    copy.CopyFrom(model)
    seen: set[str] = set()
    for node in copy.graph.node:
        if not node.name or node.name in seen:
            wish = label(node)
            while wish in taken:
                wish += "'"
            node.name = wish
            taken.add(wish)
        seen.add(node.name)
    return copy


def label(node: onnx.NodeProto) -> str:
    """What a node without a name of its own is called in a profile."""
    return f"{node.op_type} → {next((o for o in node.output if o), '?')}"


def owners(model: onnx.ModelProto) -> dict[str, str]:
    """The original's node by the names that the runtime may give to what it runs.

    Those are the names of nodes, and for convolutions and pools in its blocked layout `TENSOR_nchwc` after the tensor
    that leaves them, for convolutions be it behind an activation and a sum that were fused into them.
    """
    found: dict[str, str] = {}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        found[node.name] = next((p.value for p in node.metadata_props if p.key == SITE), node.name)
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type not in _BLOCKED:
            continue
        tensor = node.output[0]
        for _ in range(4 if node.op_type == "Conv" else 1):
            found.setdefault(f"{tensor}_nchwc", found[node.name])
            after = readers.get(tensor, [])
            if len(after) != 1 or after[0].op_type not in _FUSED:
                break
            tensor = after[0].output[0]
    return found


def kinds(model: onnx.ModelProto) -> dict[str, str]:
    """The kind that was put in a node's place, by the original's node, as the factors' metadata says."""
    found = {}
    for node in model.graph.node:
        said = {p.key: p.value for p in node.metadata_props}
        if SITE in said:
            found[said[SITE]] = said.get(PASS, "")
    return found


def owner_of(name: str, known: Mapping[str, str]) -> str | None:
    """The original's node that something the runtime ran stands for; None when it stands for none of them alone."""
    if name in known:
        return known[name]
    head = name
    while "/" in head:
        head = head.rpartition("/")[0]
        if head in known:
            return known[head]
    return None


def compared(before: Profile, after: Profile, kinds: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """A row for each node of the original with its milliseconds before and after, in the order of its graph.

    Args:
        kinds: what was put in a node's place, by name.
    """
    old, new = before.by_owner(), after.by_owner()
    order = {name: i for i, name in enumerate(before.own)}
    names = sorted({*old, *new}, key=lambda name: (order.get(name, len(order)), name))
    rows = []
    for name in names:
        was, now = old.get(name), new.get(name)
        rows.append(
            {
                "node": name,
                "op": before.own.get(name) or after.own.get(name) or _MADE,
                "choice": (kinds or {}).get(name),
                "before_ms": round(was[0], 6) if was else None,
                "after_ms": round(now[0], 6) if now else None,
                "ran_before": _counted(was[1]) if was else None,
                "ran_after": _counted(now[1]) if now else None,
            }
        )
    return rows


def _counted(ops: Sequence[str]) -> str:
    counts = {op: list(ops).count(op) for op in dict.fromkeys(ops)}
    return " + ".join(op if n == 1 else f"{n} {op}" for op, n in counts.items())


def fusions(before: Profile, after: Profile) -> list[dict[str, Any]]:
    """Operators that the runtime made (fusions) or put in (Transpose, Cast, copies, changes of layout), by count.

    With the nodes of the original at which such a fusion no longer runs.
    """
    old, new = _counts(before), _counts(after)
    own = {*before.own.values(), *after.own.values(), *before.inner, *after.inner}
    rows = []
    for op in sorted({*old, *new}):
        moves = op in _MOVES
        if op in own and not moves:
            continue
        was, now = old.get(op, 0), new.get(op, 0)
        name = "data movement" if moves else "fusion"
        gone = [] if moves else _lost_at(op, before, after)
        change = _change(was, now, moves=moves)
        rows.append({"op": op, "what": name, "before": was, "after": now, "change": change, "lost_at": gone})
    return rows


def _lost_at(op: str, before: Profile, after: Profile) -> list[str]:
    """Nodes at which an operator ran before and no longer does, in the order of the graph."""
    here = _places(op, before)
    gone = {place for place, count in here.items() if count > _places(op, after).get(place, 0)}
    order = {name: i for i, name in enumerate(before.own)}
    return sorted(gone, key=lambda name: (order.get(name, len(order)), name))


def _places(op: str, profile: Profile) -> dict[str, int]:
    """How often an operator runs, by the node that it stands for, or by the name that the runtime gave it."""
    found: dict[str, int] = {}
    for name, ran in profile.ops.items():
        if ran == op:
            place = owner_of(name, profile.owners) or name
            found[place] = found.get(place, 0) + 1
    return found


def _change(before: int, after: int, *, moves: bool) -> str:
    if before == after:
        return "as before"
    if moves:
        return ("introduced" if not before else "more") if after > before else ("removed" if not after else "fewer")
    return "gained" if after > before else "lost"


def _counts(profile: Profile) -> dict[str, int]:
    found: dict[str, int] = {}
    for op in profile.ops.values():
        found[op] = found.get(op, 0) + 1
    return found
