"""Find the sites: every node of the model is a site, or stays with a reason from a closed list.

    MatMul   x·B or B·x with B constant, x·B also with a batch of matrices B;
             com.microsoft FusedMatMul, any transB and alpha, becomes one too; not transA, transBatchA, transBatchB
    Gemm     x'·B' with constant B and C, any transA, transB, alpha, beta
    Conv     1-D, 2-D, 3-D, any stride, dilation, pad; ConvTranspose too, of one group and without output_shape

Biases, norms and constants by channel that follow are folded in (`fold`). Weights are initializers or Constant nodes,
also behind Identity, Transpose, Cast, Reshape and the like. Nodes that read one weight alike are one site (`tie`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.constants import is_constant_op
from onnx_lowrank.graph import Graph
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.fold import Folded, fold_following, only_reader, residual
from onnx_lowrank.passes.tie import tie
from onnx_lowrank.passes.transposed import is_disjoint, scattering
from onnx_lowrank.protos import attribute, subgraphs
from onnx_lowrank.sites import Geometry, Keep, Site, Why
from onnx_lowrank.values import all_finite
from onnx_lowrank.wellformed import fits_kernel, is_sound

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LINEAR = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_FUSED = ("FusedMatMul", "com.microsoft")
_TURNED = ("transA", "transBatchA", "transBatchB")
_OTHER_LINEAR = (
    *("Einsum", "LSTM", "GRU", "RNN", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
    *("DeformConv", "FusedConv", "FusedGemm", "TransposeMatMul", "Attention", "MultiHeadAttention"),
    *("QAttention", "MatMulNBits", "DynamicQuantizeMatMul", "QGemm"),
)


@dataclass(frozen=True)
class Survey:
    """The sites of a model in graph order, and every other node with its reason."""

    sites: tuple[Site, ...]
    kept: tuple[Keep, ...]


def survey(graph: Graph) -> Survey:
    """Read the whole model: main graph, bodies of control flow, local functions."""
    found = tie(
        graph,
        [_look(graph, position) for position in range(len(graph.protos))],
        root=lambda position: _root(graph, graph.protos[position]),
        plain=lambda position: _look(graph, position, fold=False),
    )
    inner = [keep for node in graph.protos for keep in _inside(node)]
    functions = [Keep(n.name, n.op_type, Why.FUNCTION) for f in graph.model.functions for n in f.node]
    kept = [k for k in found if isinstance(k, Keep)]
    return Survey(tuple(s for s in found if isinstance(s, Site)), (*kept, *inner, *functions))


def _inside(node: onnx.NodeProto) -> Iterator[Keep]:
    for body in subgraphs(node):
        for inner in body.node:
            yield Keep(inner.name, inner.op_type, Why.SUBGRAPH)
            yield from _inside(inner)


def _look(graph: Graph, position: int, *, fold: bool = True) -> Site | Keep:
    node = graph.protos[position]
    why = _refusal(graph, node)
    if why is None:
        read = {"MatMul": _matmul, "FusedMatMul": _fused_matmul, "Gemm": _gemm}.get(node.op_type, _conv)
        result = read(graph, position, node, fold)
        if isinstance(result, Site):
            return dataclasses.replace(result, joins=residual(graph, result.y))
        why = result
    return Keep(graph.names[position], node.op_type, why)


def _weight_name(graph: Graph, node: onnx.NodeProto) -> str | None:
    names = [node.input[1]] if node.op_type != "MatMul" else [node.input[1], node.input[0]]
    return next((n for n in names if graph.constants.chain(n) is not None), None)


def _root(graph: Graph, node: onnx.NodeProto) -> str:
    """The constant that a site's weight comes from."""
    name = _weight_name(graph, node) or ""
    return (graph.constants.chain(name) or [name])[-1]


def _refusal(graph: Graph, node: onnx.NodeProto) -> Why | None:
    fused = (node.op_type, node.domain) == _FUSED
    if node.op_type in _OTHER_LINEAR or (fused and any(attribute(node, name, 0) for name in _TURNED)):
        return Why.UNSUPPORTED_OP
    if not fused and (node.op_type not in _LINEAR or node.domain not in ("", "ai.onnx")):
        return Why.NOT_LINEAR
    if graph.opset < 7:
        return Why.OPSET
    if not is_sound(node):
        return Why.MALFORMED
    name = _weight_name(graph, node)
    if name is None or graph.constants.is_sparse(name):
        return _not_constant(graph, node)
    return _chain_refusal(graph, graph.constants.chain(name) or [])


def _not_constant(graph: Graph, node: onnx.NodeProto) -> Why:
    if any(graph.constants.is_sparse(name) for name in node.input):
        return Why.SPARSE
    return Why.DEQUANTIZED if any(_dequantized(graph, name) for name in node.input) else Why.WEIGHT_NOT_CONSTANT


def _dequantized(graph: Graph, name: str) -> bool:
    """Whether a tensor is made of stored integers alone, maybe through Transpose and the like."""
    for _ in range(8):
        position = graph.producer(name) if name else None
        node = None if position is None else graph.protos[position]
        if node is None or not node.input:
            return False
        if node.op_type == "DequantizeLinear":
            return graph.constants.chain(node.input[0]) is not None
        if not is_constant_op(node):
            return False
        name = node.input[0]
    return False


def _chain_refusal(graph: Graph, chain: list[str]) -> Why | None:
    if graph.constants.overridable.intersection(chain):
        return Why.OVERRIDABLE
    if graph.outputs.intersection(chain):
        return Why.IS_OUTPUT
    if graph.quantized.intersection(chain):
        return Why.QUANTIZED
    return None


def _values(weight: npt.NDArray[Any] | None) -> npt.NDArray[Any] | Why:
    if weight is None:
        return Why.WEIGHT_NOT_CONSTANT
    if weight.dtype.name not in _DTYPES:
        return Why.DTYPE
    if weight.size == 0:
        return Why.EMPTY
    return weight if all_finite(weight) else Why.NOT_FINITE


def _matmul(graph: Graph, position: int, node: onnx.NodeProto, fold: bool) -> Site | Why:
    name = _weight_name(graph, node) or ""
    side = "right" if name == node.input[1] else "left"
    value = _values(graph.constants.value(name))
    if isinstance(value, Why):
        return value
    if value.ndim < 2:
        return Why.VECTOR
    batch = value.shape[:-2]
    groups = math.prod(batch)
    if groups > 1 and (side == "left" or min(value.shape[-2:]) < 2):
        return Why.BATCHED
    weight = (value.swapaxes(-1, -2) if side == "right" else value).reshape(
        -1, value.shape[-2 if side == "right" else -1]
    )
    folded = Folded(weight, None, (position,), node.output[0])
    if side == "right" and groups == 1 and fold:
        folded = fold_following(graph, folded, 0, 1)
    x = node.input[0] if side == "right" else node.input[1]
    more: dict[str, Any] = {"groups": groups, "batch": batch}
    geometry = _geometry(graph, "MatMul", folded, side=side, bias=folded.bias is not None, **more)
    return Site(graph.names[position], geometry, folded.weight, folded.bias, x, folded.y, folded.nodes)


def _fused_matmul(graph: Graph, position: int, node: onnx.NodeProto, fold: bool) -> Site | Why:
    value = _values(graph.constants.value(node.input[1]))
    if isinstance(value, Why):
        return value
    if value.ndim != 2:
        return Why.VECTOR if value.ndim < 2 else Why.BATCHED
    weight = _scaled(value if attribute(node, "transB", 0) else value.T, attribute(node, "alpha", 1.0))
    if weight is None:
        return Why.NOT_FINITE
    folded = Folded(weight, None, (position,), node.output[0])
    if fold:
        folded = fold_following(graph, folded, 0, 1)
    geometry = _geometry(graph, "MatMul", folded, side="right", bias=folded.bias is not None)
    return Site(graph.names[position], geometry, folded.weight, folded.bias, node.input[0], folded.y, folded.nodes)


def _scaled(weight: npt.NDArray[Any], alpha: float) -> npt.NDArray[Any] | None:
    """`alpha` times a weight in its own type; None where that is not finite."""
    if alpha == 1.0:  # the weight stays where it is, mapped from its file
        return weight
    with np.errstate(over="ignore", invalid="ignore"):
        found = (weight.astype(np.float64) * alpha).astype(weight.dtype)
    return found if all_finite(found) else None


def _gemm(graph: Graph, position: int, node: onnx.NodeProto, fold: bool) -> Site | Why:
    value = _values(graph.constants.value(node.input[1]))
    if isinstance(value, Why):
        return value
    if value.ndim != 2:
        return Why.MALFORMED
    weight = _scaled(value if attribute(node, "transB", 0) else value.T, attribute(node, "alpha", 1.0))
    if weight is None:
        return Why.NOT_FINITE
    bias = _vector(graph, node.input[2] if len(node.input) > 2 else "", len(weight))
    if bias is None:
        return Why.BIAS
    folded = Folded(weight, bias * attribute(node, "beta", 1.0), (position,), node.output[0])
    if fold:
        folded = fold_following(graph, folded, 0, 2)
    geometry = _geometry(graph, "Gemm", folded, trans_a=bool(attribute(node, "transA", 0)))
    return Site(graph.names[position], geometry, folded.weight, folded.bias, node.input[0], folded.y, folded.nodes)


def _conv(graph: Graph, position: int, node: onnx.NodeProto, fold: bool) -> Site | Why:
    value = _values(graph.constants.value(node.input[1]))
    if isinstance(value, Why):
        return value
    groups = int(attribute(node, "group", 1))
    if value.ndim < 3 or groups < 1 or len(value) % groups:
        return Why.MALFORMED
    transposed = node.op_type == "ConvTranspose"
    if transposed and (groups > 1 or attribute(node, "output_shape", None)):
        return Why.UNSUPPORTED_OP
    value = value.swapaxes(0, 1) if transposed else value
    if groups > 1 and min(value.shape[1], len(value) // groups) < 2:
        return Why.GROUPED
    spatial = value.ndim - 2
    if not fits_kernel(node, value.shape[2:]):
        return Why.MALFORMED
    bias = _vector(graph, node.input[2] if len(node.input) > 2 else "", len(value))
    if bias is None:
        return Why.BIAS
    folded = Folded(value.reshape(len(value), -1), bias, (position,), node.output[0])
    if fold:
        folded = fold_following(graph, folded, spatial, spatial + 2)
    auto_pad = attribute(node, "auto_pad", b"NOTSET").decode()
    geometry = _geometry(
        graph,
        node.op_type,
        folded,
        channels=value.shape[1],
        groups=groups,
        kernel=tuple(value.shape[2:]),
        strides=tuple(attribute(node, "strides", [1] * spatial)),
        dilations=tuple(attribute(node, "dilations", [1] * spatial)),
        pads=tuple(attribute(node, "pads", [0] * (2 * spatial))),
        auto_pad=auto_pad,
        output_padding=tuple(attribute(node, "output_padding", ())),
        then=_activation(graph, folded.y),
    )
    if transposed and is_disjoint(geometry):
        geometry, folded = scattering(geometry, folded)
    return Site(graph.names[position], geometry, folded.weight, folded.bias, node.input[0], folded.y, folded.nodes)


def _activation(graph: Graph, y: str) -> str:
    """The activation that alone reads a convolution's output; one that only clips is timed as a Relu."""
    position = only_reader(graph, y)
    op = "" if position is None else graph.protos[position].op_type
    return {"Clip": "Relu", "LeakyRelu": "Relu"}.get(op, op if op in ("Relu", "Sigmoid", "Tanh") else "")


def _vector(graph: Graph, name: str, outputs: int) -> Array | None:
    """A bias over the output channels, float64; zeros when there is none, None when it is not fixed or not finite."""
    if not name:
        return np.zeros(outputs)
    value = graph.constants.fixed(name)
    if value is None or value.size not in (1, outputs) or value.shape[:-1] not in ((), (1,)):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (outputs,)).copy()


def _geometry(graph: Graph, op: str, folded: Folded, **more: Any) -> Geometry:
    outputs, inputs = folded.weight.shape
    fields: dict[str, Any] = {"bias": True, **more}
    return Geometry(op, outputs, inputs, folded.weight.dtype.name, opset=graph.opset, **fields)
