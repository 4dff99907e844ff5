"""Two factors made fit for 8 bits: what passes between them gets channels alike, and the product stays.

before   x -[ down  r×K, b ]- t -[ up  N×r, c ]-> y
mixed    x -[ M down, M b ]- M t -[ up M⁻¹, c ]-> y
after    x -[ down / s, (b − m) / s ]- (t − m) / s -[ up · s, c + up m ]-> y

The channels of t have falling variances, and one step has to do for all of them, and one for each row of `up`. `M`
makes the columns of `up` orthonormal and turns them at random, so that every channel is a sum of all and the peaks of
one are spread over all (QuaRot, arXiv 2404.00456, does so at run time; between two factors it is free). It gains
nothing where the channels peak together, so that `mixed` and not mixed are both tried. `s` is a power of the ranges
that channels then have, the one with the least noise at y (`noise.balanced_scale`). `m` is the middle of a channel's
range; it is moved only where that is exact: a pointwise second convolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.stats import ortho_group

from onnx_lowrank.linalg import Array
from onnx_lowrank.noise import balanced_scale
from onnx_lowrank.protos import attribute, reads

_MATRIX = 2  # axes
_WORST = 1e4  # condition of a second factor that is mixed


@dataclasses.dataclass(frozen=True)
class Spread:
    """Least, largest and mean value, and mean square, of every channel of a tensor."""

    low: Array
    high: Array
    mean: Array
    power: Array


@dataclasses.dataclass(frozen=True)
class Thin:
    """A tensor that leads from one linear node to the next and nowhere else.

    Attributes:
        tensor: its name.
        axis: of its channels.
        down, up: positions of the two nodes.
        rows: axis of the first weight that makes the channels.
        columns: axis of the second weight that reads them.
        pointwise: whether every output of the second node reads one position.
    """

    tensor: str
    axis: int
    down: int
    up: int
    rows: int
    columns: int
    pointwise: bool


def thin_tensors(graph: onnx.GraphProto) -> list[Thin]:
    """All pairs of linear nodes with constant weights of their own that can be balanced."""
    counted = reads(graph, graph.node)
    weights = {tensor.name for tensor in graph.initializer if counted[tensor.name] == 1}
    batches = {tensor.name for tensor in graph.initializer if len(tensor.dims) > _MATRIX}
    makers = {node.output[0]: position for position, node in enumerate(graph.node) if node.output}
    found = []
    for up, node in enumerate(graph.node):
        down = makers.get(node.input[0]) if node.input else None
        if down is None or counted[node.input[0]] != 1:
            continue
        first, second = _axes(graph.node[down]), _axes(node)
        if first is None or second is None or any(graph.node[p].input[1] not in weights for p in (down, up)):
            continue
        if any(graph.node[p].op_type == "MatMul" and graph.node[p].input[1] in batches for p in (down, up)):
            continue
        if len(graph.node[down].input) > 2 and graph.node[down].input[2] not in weights:
            continue
        found.append(Thin(node.input[0], first[2], down, up, first[0], second[1], _pointwise(node)))
    return found


def _axes(node: onnx.NodeProto) -> tuple[int, int, int] | None:
    """Axes of a weight that make outputs and read inputs, and the axis of the channels of the output."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Conv":
        return (0, 1, 1) if attribute(node, "group", 1) == 1 else None
    if node.op_type == "MatMul":
        return 1, 0, -1
    if node.op_type == "Gemm" and not attribute(node, "transA", 0):
        return (0, 1, 1) if attribute(node, "transB", 0) else (1, 0, 1)
    return None


def _pointwise(node: onnx.NodeProto) -> bool:
    kernel = attribute(node, "kernel_shape", [0])
    return node.op_type == "Conv" and all(k == 1 for k in kernel) and not any(attribute(node, "pads", [0]))


def second_factor(graph: onnx.GraphProto, thin: Thin) -> Array:
    """What reads the channels of a thin tensor: N×r×taps."""
    weight = next(t for t in graph.initializer if t.name == graph.node[thin.up].input[1])
    value = np.moveaxis(_value(weight), thin.columns, 1)
    return value.reshape(*value.shape[:2], -1)


def mixing(second: Array) -> Array | None:
    """M, r×r, after which the columns of the second factor are orthonormal, turned at random.

    None for a single channel, and where the second factor has fewer entries for a channel than there are channels, or
    hardly tells some of them apart.

    Args:
        second: N×r×taps.
    """
    flat = second.transpose(0, 2, 1).reshape(-1, second.shape[1])
    entries, rank = flat.shape
    if rank < 2 or entries < rank:
        return None
    triangle = np.linalg.qr(flat, mode="r")
    if np.linalg.cond(triangle) > _WORST:
        return None
    return np.asarray(ortho_group.rvs(rank, random_state=rank) @ triangle)


def mix(graph: onnx.GraphProto, thin: Thin, mixed: Array) -> None:
    """Mix the channels of one tensor by M (r×r) and take it out of the next weight; in place."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    down, up = graph.node[thin.down], graph.node[thin.up]
    first, second = _value(initializers[down.input[1]]), _value(initializers[up.input[1]])
    turned = np.tensordot(mixed, np.moveaxis(first, thin.rows, 0), axes=1)
    _store(initializers[down.input[1]], np.moveaxis(turned, 0, thin.rows))
    turned = np.moveaxis(second, thin.columns, -1) @ np.linalg.inv(mixed)
    _store(initializers[up.input[1]], np.moveaxis(turned, -1, thin.columns))
    if len(down.input) > 2:
        _store(initializers[down.input[2]], mixed @ _value(initializers[down.input[2]]))


def scaling(thin: Thin, second: Array, found: Spread) -> tuple[Array, Array, float]:
    """Scale and middle of every channel, for the least noise behind the second node, and that noise.

    Args:
        second: N×r×taps.
        found: extremes, means and mean squares by channel.
    """
    centre = (found.low + found.high) / 2 if thin.pointwise else np.zeros_like(found.low)
    half = np.maximum(found.high - centre, centre - found.low)
    largest = float(half.max(initial=0.0))
    if largest <= 0:
        return np.ones_like(half), centre, 0.0
    power = np.maximum(found.power - 2 * centre * found.mean + centre**2, 0.0)
    scale, noise = balanced_scale(second, np.maximum(half, largest * 1e-4), power)
    return scale, centre, noise


def balance(graph: onnx.GraphProto, thin: Thin, scale: Array, centre: Array) -> None:
    """Scale the channels of one tensor down by `scale` about `centre`, and the next weight up; in place.

    Args:
        scale, centre: by channel.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    down, up = graph.node[thin.down], graph.node[thin.up]
    first = _value(initializers[down.input[1]])
    _store(initializers[down.input[1]], first / _along(scale, thin.rows, first.ndim))
    second = _value(initializers[up.input[1]])
    _store(initializers[up.input[1]], second * _along(scale, thin.columns, second.ndim))
    moved = bool(centre.any())
    if len(down.input) > 2:
        bias = initializers[down.input[2]]
        _store(bias, (_value(bias) - centre) / scale)
    elif moved:
        _new(graph, down, f"{thin.tensor}/bias", -centre / scale)
    if moved:
        added = np.tensordot(np.moveaxis(second, thin.columns, -1), centre, axes=1).reshape(len(second))
        if len(up.input) > 2:
            _store(initializers[up.input[2]], _value(initializers[up.input[2]]) + added)
        else:
            _new(graph, up, f"{up.output[0]}/bias", added)


def _along(vector: Array, axis: int, dims: int) -> Array:
    shape = [1] * dims
    shape[axis] = -1
    return vector.reshape(shape)


def _value(tensor: onnx.TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor), np.float64)


def _store(tensor: onnx.TensorProto, value: Array) -> None:
    dtype = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype)), tensor.name))


def _new(graph: onnx.GraphProto, node: onnx.NodeProto, name: str, value: Array) -> None:
    graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    node.input.append(name)


def correct_biases(graph: onnx.GraphProto, means: Mapping[str, Array]) -> None:
    """Take the mean error that rounding a weight will cause out of the bias; in place.

    `b' = b − (W₈ − W) E[x]`, by convolution and Gemm whose input has known means by channel. Local: what a site
    corrects is its own rounding, so the corrections of several sites do not add up twice.

    Args:
        means: by tensor, by channel.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    counted = reads(graph, graph.node)
    for node in graph.node:
        axes = _axes(node) if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else None
        mean = means.get(node.input[0]) if axes is not None else None
        if axes is None or mean is None or any(counted[name] != 1 for name in node.input[1:3]):
            continue
        if any(name not in initializers for name in node.input[1:3]):
            continue
        weight = np.moveaxis(_value(initializers[node.input[1]]), axes[:2], (0, 1))
        if weight.shape[1] != len(mean):
            continue
        lost = (rounded(weight) - weight).reshape(*weight.shape[:2], -1).sum(2) @ mean
        bias = initializers[node.input[2]]
        if bias.dims and list(bias.dims) == [len(lost)]:
            _store(bias, _value(bias) - lost)


def rounded(weight: Array) -> Array:
    """A weight as its 8 bits will read: symmetric, a scale for each output channel (the first axis)."""
    flat = weight.reshape(len(weight), -1)
    scale = np.abs(flat).max(1, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1.0)
    found: Array = (np.clip(np.rint(flat / scale), -127, 127) * scale).reshape(weight.shape)
    return found
