"""A model in the form that converters to other precisions expect: every change here is exact.

before   x -[ Conv  W (a Constant node) ]- t -[ BatchNormalization ]-> y      nodes without names
after    x -[ Conv  W', b' (initializers) ]-> y                               named nodes, weights inside
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, version_converter

from onnx_lowrank.errors import ModelError
from onnx_lowrank.protos import attribute, needed_for, opset_of, plain_constant, reads, unique_names
from onnx_lowrank.tensors import is_external, read_tensor, tensors_of

_NORM_INPUTS = 5


def normal(model: onnx.ModelProto, folder: Path, opset: int = 0) -> onnx.ModelProto:
    """A copy with weights inside as initializers, named nodes and folded BatchNormalizations.

    Args:
        folder: where external data lies.
        opset: at least this version of the operator set.

    Raises:
        ModelError: the model cannot be brought to that operator set.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _embed(copy, folder)
    copy = _at_least(copy, opset)
    graph = copy.graph
    for node, name in zip(graph.node, unique_names(list(graph.node)), strict=True):
        node.name = name
    _constants_to_initializers(graph)
    known = {tensor.name for tensor in graph.initializer}
    listed = [value for value in graph.input if value.name not in known]
    del graph.input[:]
    graph.input.extend(listed)
    copy.ir_version = max(copy.ir_version, 4)
    _fold_norms(graph)
    _drop_unread(graph)
    return copy


def _embed(model: onnx.ModelProto, folder: Path) -> None:
    for tensor in tensors_of(model):
        if is_external(tensor):
            value = read_tensor(tensor, folder)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def _at_least(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    here = opset_of(model)
    if here >= opset:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except Exception as fault:  # the converter's failures share no base class
        why = " ".join(str(fault).split())[:160]
        raise ModelError(
            f"the model is of operator set {here}, int8 by channel needs {opset}, and it cannot be converted ({why}); "
            f"export it with operator set {opset} or later"
        ) from None


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    nodes = []
    for node in graph.node:
        tensor = _constant(node)
        if tensor is None:
            nodes.append(node)
            continue
        added = graph.initializer.add()
        added.CopyFrom(tensor)
        added.name = node.output[0]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The dense tensor of a Constant node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    tensors: list[onnx.TensorProto] = [a.t for a in node.attribute if a.name == "value"]
    return tensors[0] if tensors else plain_constant(node)


def _fold_norms(graph: onnx.GraphProto) -> None:
    """BatchNormalizations that alone read a convolution become part of it, as the runtime would do on loading."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    counted = reads(graph, graph.node)
    makers = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    gone = []
    for position, norm in enumerate(graph.node):
        conv = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or counted[norm.input[0]] != 1 or any(norm.output[1:]) or attribute(norm, "training_mode", 0):
            continue
        names = [*conv.input[1:], *norm.input[1:_NORM_INPUTS]]
        if any(name not in known for name in names):
            continue
        _fold(graph, conv, norm, [_value(known[name]) for name in names])
        gone.append(position)
    for position in reversed(gone):
        del graph.node[position]


def _fold(
    graph: onnx.GraphProto, conv: onnx.NodeProto, norm: onnx.NodeProto, values: list[npt.NDArray[np.float64]]
) -> None:
    *mine, gamma, beta, mean, variance = values
    scale = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    bias = mine[1] if len(mine) > 1 else np.zeros_like(scale)
    weight = mine[0] * scale.reshape(-1, *[1] * (mine[0].ndim - 1))
    names = [f"{norm.output[0]}/folded_weight", f"{norm.output[0]}/folded_bias"]
    for name, array in zip(names, (weight, scale * (bias - mean) + beta), strict=True):
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    inputs = [conv.input[0], *names]
    del conv.input[:]
    conv.input.extend(inputs)
    conv.output[0] = norm.output[0]


def _value(tensor: onnx.TensorProto) -> npt.NDArray[np.float64]:
    return np.asarray(numpy_helper.to_array(tensor), np.float64)


def _drop_unread(graph: onnx.GraphProto) -> None:
    _, read = needed_for(graph.node, [o.name for o in graph.output])
    counted = reads(graph, graph.node)
    kept = [tensor for tensor in graph.initializer if counted[tensor.name] or tensor.name in read]
    if len(kept) < len(graph.initializer):
        tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(tensors)
