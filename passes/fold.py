"""Fold what follows a linear node, exactly: biases, norms and constants by channel become part of the site.

    before   x -[ Conv  W, b ]- t -[ BatchNormalization  γ, β, μ, σ² ]-> y
    site     x -[ Conv  sW, s(b − μ) + β ]-> y            with s = γ / √(σ² + ε), per output channel

    before   x -[ MatMul  W ]- t -[ Add  b ]-> y
    site     x -[ MatMul  W, b ]-> y

    before   x -[ Conv  W, b ]- t -[ Sub  m ]- u -[ Mul  s ]- v -[ Add  c ]-> y
    site     x -[ Conv  sW, s(b − m) + c ]-> y             any of Add, Sub, Mul, Div, in any order

Only the site changes its meaning; the graph changes where the site is rewritten, and nowhere else.
Left alone: t read elsewhere or a graph output, constants that are computed, that a caller may override, that are not
finite or do not go by channel, 1 ÷ t, BatchNormalization in training mode or with a variance of zero and no epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.graph import Graph
from onnx_lowrank.linalg import Array
from onnx_lowrank.protos import attribute

STEPS = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True)
class Folded:
    """Weight (N×K), bias (N, float64, or None), positions of the nodes taken in, and the tensor that leaves."""

    weight: npt.NDArray[Any]
    bias: Array | None
    nodes: tuple[int, ...]
    y: str


def only_reader(graph: Graph, tensor: str) -> int | None:
    """Position of the one node that reads a tensor; None when there are more, or none, or it leaves the graph."""
    readers = graph.readers(tensor)
    return readers[0] if len(readers) == 1 and tensor not in graph.outputs else None


def residual(graph: Graph, y: str) -> tuple[str, str] | None:
    """Output and other operand of a residual Add that alone reads y."""
    position = only_reader(graph, y)
    if position is None or graph.protos[position].op_type != "Add":
        return None
    node = graph.protos[position]
    other = node.input[1] if node.input[0] == y else node.input[0]
    computed = graph.producer(other) is not None and graph.constants.chain(other) is None
    return (node.output[0], other) if computed and other != y else None


def fold_norm(graph: Graph, folded: Folded) -> Folded:
    """Take in a BatchNormalization that is the only reader of the site's output."""
    position = only_reader(graph, folded.y)
    node = graph.protos[position] if position is not None else None
    if position is None or node is None or node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
        return folded
    whole = len(node.input) == 5 and node.output
    if not whole or attribute(node, "training_mode", 0) or node.input[0] != folded.y or any(node.output[1:]):
        return folded
    values = [graph.constants.fixed(name) for name in node.input[1:5]]
    if any(v is None or v.shape != (folded.weight.shape[0],) for v in values):
        return folded
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    if (variance + attribute(node, "epsilon", 1e-5) <= 0).any():
        return folded
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    bias = np.zeros_like(scale) if folded.bias is None else folded.bias
    return _scaled(folded, scale, scale * (bias - mean) + beta, position, node.output[0])


def fold_following(graph: Graph, folded: Folded, axes: int, most: int) -> Folded:
    """Take in norms, sums and products with constants for each output channel, one after the other.

    Args:
        axes: behind the axis of the channels.
        most: axes that a constant may have; more would give the output more than it has.
    """
    while True:
        after = _fold_step(graph, fold_norm(graph, folded) if most > 1 else folded, axes, most)
        if after is folded:
            return folded
        folded = after


def _fold_step(graph: Graph, folded: Folded, axes: int, most: int) -> Folded:
    """Take in an Add, Sub, Mul or Div with a constant that is the only reader."""
    position = only_reader(graph, folded.y)
    node = graph.protos[position] if position is not None else None
    if position is None or node is None or node.op_type not in STEPS or node.domain not in ("", "ai.onnx"):
        return folded
    if len(node.input) != 2 or not node.output:
        return folded
    first = node.input[0] == folded.y
    value = by_channel(graph.constants.fixed(node.input[1] if first else node.input[0]), len(folded.weight), axes, most)
    if value is None or (node.op_type == "Div" and (not first or not value.all())):
        return folded
    weight, bias = folded.weight, folded.bias
    if node.op_type in ("Mul", "Div"):
        scale = value if node.op_type == "Mul" else 1 / value
        return _scaled(folded, scale, None if bias is None else scale * bias, position, node.output[0])
    known = np.zeros(len(weight)) if bias is None else bias
    if node.op_type == "Sub" and not first:
        return _scaled(folded, np.full(len(weight), -1.0), value - known, position, node.output[0])
    bias = known + value if node.op_type == "Add" else known - value
    return Folded(weight, bias, (*folded.nodes, position), node.output[0])


def _scaled(folded: Folded, scale: Array, bias: Array | None, position: int, y: str) -> Folded:
    """The map with its rows scaled; as it is where that is not finite."""
    with np.errstate(over="ignore"):
        weight = (folded.weight * scale[:, None]).astype(folded.weight.dtype)
    if not np.isfinite(weight.astype(np.float64)).all():
        return folded
    return Folded(weight, bias, (*folded.nodes, position), y)


def by_channel(value: npt.NDArray[Any] | None, count: int, axes: int, most: int) -> Array | None:
    """A constant as a vector over the channels; None where it is none."""
    if value is None or value.ndim > most:
        return None
    along = value.ndim - 1 - axes
    if value.size != 1 and (along < 0 or not value.size == value.shape[along] == count):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (count,)).copy()
