"""Readings of NodeProto and GraphProto that need no graph library."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnx_lowrank.tensors import make_tensor

BORDER = "onnx_lowrank_border"
"""Start of the names of the nodes and tensors that mark the border of an opened body."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A fused node, and the plain nodes that stand for it; the last one gives its output."""

    fused: onnx.NodeProto
    nodes: tuple[onnx.NodeProto, ...]


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute, or `default`."""
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators in a model."""
    return next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 1)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of If, Loop and Scan, not their inner ones."""
    for found in node.attribute:
        if found.type == onnx.AttributeProto.GRAPH:
            yield found.g
        yield from found.graphs


def outer_reads(graph: onnx.GraphProto) -> Counter[str]:
    """How often a body, with the bodies inside it, reads each tensor that it does not make itself."""
    counted: Counter[str] = Counter(o.name for o in graph.output)
    for node in graph.node:
        counted.update(name for name in node.input if name)
        for body in subgraphs(node):
            counted.update(outer_reads(body))
    own = (
        {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer} | {i.name for i in graph.input}
    )
    return Counter({name: count for name, count in counted.items() if name not in own})


def reads(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> Counter[str]:
    """How often each tensor is read by the nodes, the bodies inside them, and as an output of the graph."""
    counted: Counter[str] = Counter(o.name for o in graph.output)
    for node in nodes:
        counted.update(name for name in node.input if name)
        for body in subgraphs(node):
            counted.update(outer_reads(body))
    return counted


def needed_for(nodes: Sequence[onnx.NodeProto], tensors: Iterable[str]) -> tuple[set[int], set[str]]:
    """Positions of the nodes that the named tensors depend on, and every tensor that is read on the way."""
    producer = {name: position for position, node in enumerate(nodes) for name in node.output if name}
    needed: set[int] = set()
    read, stack = set(), list(tensors)
    while stack:
        name = stack.pop()
        if name in read:
            continue
        read.add(name)
        position = producer.get(name)
        if position is not None and position not in needed:
            needed.add(position)
            node = nodes[position]
            stack += [i for i in node.input if i]
            stack += [i for body in subgraphs(node) for i in outer_reads(body)]
    return needed, read


def unique_names(nodes: list[onnx.NodeProto]) -> list[str]:
    """A readable unique name for every node: its own, else that of its first output, else with a number."""
    counted = Counter(n.name for n in nodes if n.name)
    taken = {name for name, count in counted.items() if count == 1}
    names = []
    for position, node in enumerate(nodes):
        name = node.name
        if not name or counted[name] > 1:
            first = next((o for o in node.output if o), "") or f"node_{position}"
            numbered = (f"{first}_{i}" for i in itertools.count(1))
            name = next(n for n in itertools.chain([first], numbered) if n not in taken)
            taken.add(name)
        names.append(name)
    return names


def all_names(model: onnx.ModelProto) -> set[str]:
    """Every node and tensor name in the model, bodies included."""
    names: set[str] = set()
    stack = [model.graph]
    while stack:
        graph = stack.pop()
        names.update(t.name for t in graph.initializer)
        names.update(v.name for v in (*graph.input, *graph.output, *graph.value_info))
        for node in graph.node:
            names.update((node.name, *node.input, *node.output))
            stack.extend(subgraphs(node))
    return names


def plain_constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node that is written as `value_float` or `value_floats`."""
    for found in node.attribute:
        if found.name == "value_float" and found.type == onnx.AttributeProto.FLOAT:
            return make_tensor(node.output[0], np.asarray(found.f, np.float32))
        if found.name == "value_floats" and found.type == onnx.AttributeProto.FLOATS:
            return make_tensor(node.output[0], np.asarray(found.floats, np.float32))
    return None


def evaluated(node: onnx.NodeProto, value: npt.NDArray[Any], other: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """The value of a node that turns, reshapes or converts a constant.

    Args:
        other: the value of its second input, where it has one.
    """
    given = attribute(node, "axes", None) if other is None else np.atleast_1d(other).tolist()
    axes = None if given is None else tuple(given)
    match node.op_type:
        case "Transpose":
            return np.transpose(value, attribute(node, "perm", None))
        case "Cast":
            with np.errstate(over="ignore", invalid="ignore"):
                return value.astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to", 1)))
        case "Flatten":
            axis = attribute(node, "axis", 1)
            return value.reshape(math.prod(value.shape[:axis]), -1)
        case "Reshape":
            keeps = not attribute(node, "allowzero", 0)
            return value.reshape([value.shape[i] if keeps and size == 0 else size for i, size in enumerate(axes or ())])
        case "Squeeze":
            return np.squeeze(value, axes)
        case "Unsqueeze":
            return np.expand_dims(value, axes or ())
    return value


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes without attributes, constants without data, bodies as the outer tensors that they read."""
    graph = onnx.GraphProto(name="skeleton")
    for node in model.graph.node:
        captured = [name for body in subgraphs(node) for name in outer_reads(body).elements()]
        graph.node.add(op_type=node.op_type, name=node.name, input=[*node.input, *captured], output=node.output)
    graph.initializer.extend(onnx.TensorProto(name=t.name, data_type=1, dims=[0]) for t in model.graph.initializer)
    graph.input.extend(onnx.ValueInfoProto(name=i.name) for i in model.graph.input)
    graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in model.graph.output)
    return onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)], graph=graph)
