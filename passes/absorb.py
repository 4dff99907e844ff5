"""Take scales and shifts by channel before and behind a convolution into its weight and bias, exactly.

    before   x -[ Div c ]-[ Mul s ]-[ Add b ]- t -[ Conv  W, d ]- u -[ Mul p ]-[ Sub q ]-> y
    after    x -[ Conv  p·W·s/c, p(d + Σ W b) − q ]-> y                        where the Conv pads nothing, or b is 0
    else     x -[ Add b·c/s ]-[ Conv  p·W·s/c, p·d − q ]-> y                   with one node fewer at least

Add, Sub, Mul, Div with constants, and norms behind the convolution; any number of axes and groups, depthwise ones too.
The multiply-adds stay, and passes over memory go: a tenth of the time of PP-OCR's models (decision 074).
Left alone: a norm alone behind a convolution, which the runtime folds itself; a BatchNormalization before one; a weight
that others read, that is an output or may be overridden; operands that broadcast; c ÷ x; products that the type of the
weight cannot hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnx_lowrank.fragment import Fragment, Op, X, Y
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.fold import STEPS, Folded, by_channel, fold_following, only_reader
from onnx_lowrank.protos import attribute
from onnx_lowrank.wellformed import fits_kernel, is_sound

ABSORB = "absorb"
_BROADCASTS = 7  # operator set from which on operands broadcast without being told

Shapes = Mapping[int, tuple[tuple[int, ...], ...]]
"""Shapes of a node's inputs, and last of its output, by position."""


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """A convolution, the nodes that it takes in, and the patch that does so."""

    position: int
    node: str
    taken: tuple[str, ...]
    patch: Patch


@dataclasses.dataclass(frozen=True)
class _Front:
    """What lies before a convolution: `scale x + shift`, each by channel, of the tensor `x`."""

    x: str
    scale: Array
    shift: Array
    nodes: tuple[int, ...] = ()


def absorptions(graph: Graph, shapes: Shapes) -> Iterator[Absorbed]:
    """Every convolution that can take nodes in, no node in two of them.

    Args:
        shapes: that a run has shown.
    """
    used: set[int] = set()
    for position, node in enumerate(graph.protos):
        if graph.opset < _BROADCASTS or node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
            continue
        found = _absorbed(graph, position, node, shapes, used)
        if found is not None:
            used.update(found.patch.nodes)
            yield found


def _absorbed(
    graph: Graph, position: int, node: onnx.NodeProto, shapes: Shapes, used: Collection[int]
) -> Absorbed | None:
    weight, bias = _constants(graph, node)
    if weight is None or bias is None:
        return None
    spatial = weight.ndim - 2
    folded = fold_following(graph, Folded(_rows(weight), bias, (position,), node.output[0]), spatial, spatial + 2)
    behind = folded.nodes[1:]
    if set(behind).intersection(used):
        return None
    front = _front(graph, position, node, weight, shapes, used)
    padded = any(attribute(node, "pads", [0])) or attribute(node, "auto_pad", b"NOTSET").startswith(b"SAME")
    kept = padded and bool(front.shift.any())
    if kept and (len(front.nodes) < 2 or not front.scale.all()):
        front, kept = _Front(node.input[0], np.ones_like(front.scale), np.zeros_like(front.scale)), False
    if not front.nodes and all(graph.protos[p].op_type == "BatchNormalization" for p in behind):
        return None
    fragment = _written(node, weight, folded, front, kept=kept)
    if fragment is None:
        return None
    nodes = (position, *front.nodes, *behind)
    name, taken = graph.names[position], tuple(graph.names[p] for p in (*front.nodes, *behind))
    return Absorbed(position, name, taken, Patch(name, nodes, front.x, folded.y, fragment, ABSORB))


def _constants(graph: Graph, node: onnx.NodeProto) -> tuple[npt.NDArray[Any] | None, Array | None]:
    """Weight and bias (zeros where there is none) of a convolution; None where they are not its own to change."""
    if not is_sound(node):
        return None, None
    names = [name for name in node.input[1:3] if name]
    chains = [name for one in names for name in graph.constants.chain(one) or ()]
    seen = graph.outputs | graph.quantized
    if seen.intersection(chains) or any(len(graph.readers(name)) > 1 for name in chains):
        return None, None
    weight, *rest = [graph.constants.fixed(name) for name in names]
    groups = attribute(node, "group", 1)
    if weight is None or any(value is None for value in rest) or weight.ndim < 3 or groups < 1:
        return None, None
    if len(weight) % groups or not weight.size or not fits_kernel(node, weight.shape[2:]):
        return None, None
    bias = np.zeros(len(weight)) if not rest else np.asarray(rest[0], np.float64)
    return (weight, bias) if bias.shape == (len(weight),) else (None, None)


def _front(
    graph: Graph, position: int, node: onnx.NodeProto, weight: npt.NDArray[Any], shapes: Shapes, used: Collection[int]
) -> _Front:
    """The longest chain of steps that only the convolution reads."""
    channels = weight.shape[1] * attribute(node, "group", 1)
    found = _Front(node.input[0], np.ones(channels), np.zeros(channels))
    reader = position
    while True:
        maker = graph.producer(found.x)
        if maker is None or maker in used or only_reader(graph, found.x) != reader:
            return found
        step = _step(graph, maker, channels, weight.ndim - 2, shapes)
        if step is None:
            return found
        shift = found.scale * step.shift + found.shift
        found = _Front(step.x, found.scale * step.scale, shift, (maker, *found.nodes))
        reader = maker


def _step(graph: Graph, position: int, channels: int, spatial: int, shapes: Shapes) -> _Front | None:
    """One node as a scale and a shift of its operand that is no constant; None where it is none."""
    node = graph.protos[position]
    if (
        node.op_type not in STEPS
        or node.domain not in ("", "ai.onnx")
        or len(node.input) != 2
        or position not in shapes
    ):
        return None
    values = [graph.constants.fixed(name) for name in node.input]
    constant = 1 if values[0] is None else 0
    value = by_channel(values[constant], channels, spatial, spatial + 2)
    *operands, output = shapes[position]
    if value is None or values[1 - constant] is not None or len(operands) != 2 or operands[1 - constant] != output:
        return None
    ones, x = np.ones(channels), node.input[1 - constant]
    if node.op_type == "Div":
        return _Front(x, 1 / value, 0 * ones) if constant == 1 and value.all() else None
    if node.op_type == "Mul":
        return _Front(x, value, 0 * ones)
    if node.op_type == "Sub":
        return _Front(x, ones, -value) if constant == 1 else _Front(x, -ones, value)
    return _Front(x, ones, value)


def _written(
    node: onnx.NodeProto, weight: npt.NDArray[Any], folded: Folded, front: _Front, *, kept: bool
) -> Fragment | None:
    """The convolution with everything in it, behind an Add where the shift is kept; None where it would overflow."""
    groups = attribute(node, "group", 1)
    scale, shift = (np.repeat(v.reshape(groups, -1), len(weight) // groups, axis=0) for v in (front.scale, front.shift))
    taps = folded.weight.astype(np.float64).reshape(*weight.shape[:2], -1)
    bias = np.zeros(len(weight)) if folded.bias is None else folded.bias
    bias = bias if kept else bias + np.einsum("nct,nc->n", taps, shift)
    arrays = {"weight": (taps * scale[:, :, None]).reshape(weight.shape), "bias": bias}
    ops: tuple[Op, ...] = ()
    if kept:
        arrays["shift.value"] = (front.shift / front.scale).reshape(-1, *(1,) * (weight.ndim - 2))
        ops = (Op("shift", "Add", (X, "shift.value"), "shifted"),)
    with np.errstate(over="ignore"):
        constants = {name: array.astype(weight.dtype) for name, array in arrays.items()}
    if not all(np.isfinite(array.astype(np.float64)).all() for array in constants.values()):
        return None
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    conv = Op("", "Conv", ("shifted" if kept else X, "weight", "bias"), Y, given)
    return Fragment((*ops, conv), constants)


def _rows(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return weight.reshape(len(weight), -1)
