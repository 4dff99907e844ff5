"""Fold what follows a linear node, exactly: its bias Add or its BatchNormalization become part of the site.

    before   x -[ Conv  W, b ]- t -[ BatchNormalization  γ, β, μ, σ² ]-> y
    site     x -[ Conv  sW, s(b − μ) + β ]-> y            with s = γ / √(σ² + ε), per output channel

    before   x -[ MatMul  W ]- t -[ Add  b ]-> y
    site     x -[ MatMul  W, b ]-> y

Only the site changes its meaning; the graph changes where the site is rewritten, and nowhere else.
Left alone: t read elsewhere or a graph output, constants that are computed, that a caller may override or that are not
finite, BatchNormalization in training mode or with a variance of zero and no epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.graph import Graph
from onnx_lowrank.linalg import Array
from onnx_lowrank.protos import attribute


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
    with np.errstate(over="ignore"):
        weight = (folded.weight * scale[:, None]).astype(folded.weight.dtype)
    if not np.isfinite(weight.astype(np.float64)).all():
        return folded
    return Folded(weight, scale * (bias - mean) + beta, (*folded.nodes, position), node.output[0])


def fold_bias(graph: Graph, folded: Folded) -> Folded:
    """Take in an Add of a constant over the last axis that is the only reader of a MatMul."""
    position = only_reader(graph, folded.y)
    node = graph.protos[position] if position is not None else None
    if position is None or node is None or node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return folded
    if len(node.input) != 2 or not node.output:
        return folded
    other = node.input[1] if node.input[0] == folded.y else node.input[0]
    bias = graph.constants.fixed(other)
    if bias is None or bias.shape != (folded.weight.shape[0],):
        return folded
    return Folded(folded.weight, bias.astype(np.float64), (*folded.nodes, position), node.output[0])
