"""How many rows the tables have that a model looks its integer inputs up in: what made-up ids must stay below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from onnx_lowrank.protos import subgraphs

_LOOKUPS: Final = {"Gather": ((0, 1),), "EmbedLayerNormalization": ((2, 0), (3, 8), (4, 1))}
"""By operator: the places of a table and of the ids that choose its rows."""

_SAME_VALUES: Final = (
    *("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand", "Tile"),
    *("Split", "Concat", "Clip", "Gather"),
)
"""Operators that pass ids on, all or some of them."""


def table_rows(model: onnx.ModelProto) -> dict[str, int]:
    """For each graph input that chooses rows of constant tables: the rows of the smallest one."""
    nodes = list(_all_nodes(model.graph))
    dims = dict(_constants(model.graph))
    makers = {name: node for node in nodes for name in node.output if name}
    inputs = {i.name for i in model.graph.input}
    found: dict[str, int] = {}
    for node in nodes:
        for table, ids in _LOOKUPS.get(node.op_type, ()):
            shape = _dims(node.input[table], dims, makers) if max(table, ids) < len(node.input) else None
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if shape is None or not -len(shape) <= axis < len(shape):
                continue
            for name in _sources(node.input[ids], makers) & inputs:
                found[name] = min(found.get(name, shape[axis]), shape[axis])
    return {name: rows for name, rows in found.items() if rows > 0}


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from _all_nodes(body)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Dims of all initializers and Constant nodes, those of bodies too."""
    yield from ((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], tuple(a.t.dims)) for a in node.attribute if a.name == "value" and node.output)
        for body in subgraphs(node):
            yield from _constants(body)


def _dims(name: str, dims: dict[str, tuple[int, ...]], makers: dict[str, onnx.NodeProto]) -> tuple[int, ...] | None:
    """Dims of a table, which may be stored in another type."""
    for _ in range(16):
        if name in dims:
            return dims[name]
        node = makers.get(name)
        if node is None or not node.input or node.op_type not in ("Cast", "Identity", "DequantizeLinear"):
            return None
        name = node.input[0]
    return None


def _sources(name: str, makers: dict[str, onnx.NodeProto]) -> set[str]:
    """Where ids come from: tensors that no node makes."""
    found, seen, waiting = set(), set[str](), [name]
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if name in seen:
            continue
        seen.add(name)
        if node is None:
            found.add(name)
        elif node.op_type in _SAME_VALUES and node.input:
            waiting += node.input if node.op_type == "Concat" else node.input[:1]
    return found
