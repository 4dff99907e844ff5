"""What must hold before a model is read any further: names are text, and nodes have the inputs of their operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import onnx

from onnx_lowrank.errors import ModelError

_ARITY: Final = {"MatMul": (2, 2), "Gemm": (2, 3), "Conv": (2, 3), "ConvTranspose": (2, 3)}
_TYPES: Final = {
    **dict.fromkeys(("group", "transA", "transB"), onnx.AttributeProto.INT),
    **dict.fromkeys(("alpha", "beta"), onnx.AttributeProto.FLOAT),
    **dict.fromkeys(("kernel_shape", "strides", "dilations", "pads"), onnx.AttributeProto.INTS),
    "auto_pad": onnx.AttributeProto.STRING,
}
_AUTO_PADS: Final = (b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID")


def check_text(model: onnx.ModelProto, where: str) -> None:
    """Refuse names and other texts that are not UTF-8, as files are that lost or gained a byte.

    Raises:
        ModelError: naming the file.
    """
    try:
        _ = (model.producer_name, model.producer_version, model.domain, model.doc_string)
        _ = [(p.key, p.value) for p in model.metadata_props]
        _ = [opset.domain for opset in model.opset_import]
        _read_graph(model.graph)
        for function in model.functions:
            _ = (function.name, function.domain, function.doc_string, list(function.input), list(function.output))
            _read_nodes(function.node)
    except UnicodeDecodeError:
        raise ModelError(f"'{where}' is damaged: a name in it is not text (UTF-8); export or download it again") from None


def is_sound(node: onnx.NodeProto) -> bool:
    """Whether a linear node has as many inputs and outputs, and attributes of the types, as its operator asks for."""
    least, most = _ARITY.get(node.op_type, (0, len(node.input)))
    if not least <= len(node.input) <= most or not node.output or not all((*node.input[:least], node.output[0])):
        return False
    if any(_TYPES.get(a.name, a.type) != a.type for a in node.attribute):
        return False
    return all(a.s in _AUTO_PADS for a in node.attribute if a.name == "auto_pad")


def fits_kernel(node: onnx.NodeProto, kernel: Sequence[int]) -> bool:
    """Whether the attributes of a convolution fit the shape of its weight: axes of a kernel, at least 1 each."""
    axes = len(kernel)
    given = {a.name: tuple(a.ints) for a in node.attribute if a.type == onnx.AttributeProto.INTS}
    long = all(len(given.get(name, (1,) * axes)) == axes for name in ("strides", "dilations", "kernel_shape"))
    fits = tuple(given.get("kernel_shape", kernel)) == tuple(kernel) and len(given.get("pads", (0,) * 2 * axes)) == 2 * axes
    positive = all(n >= 1 for name in ("strides", "dilations") for n in given.get(name, ()))
    return long and fits and positive and axes >= 1


def _read_graph(graph: onnx.GraphProto) -> None:
    _ = (graph.name, graph.doc_string)
    for tensor in graph.initializer:
        _ = (tensor.name, tensor.doc_string, [(e.key, e.value) for e in tensor.external_data])
    for value in (*graph.input, *graph.output, *graph.value_info):
        _ = (value.name, value.doc_string)
    _read_nodes(graph.node)


def _read_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        _ = (node.name, node.op_type, node.domain, node.doc_string, list(node.input), list(node.output))
        for attribute in node.attribute:
            _ = (attribute.name, attribute.t.name if attribute.HasField("t") else "")
            if attribute.HasField("g"):
                _read_graph(attribute.g)
            for graph in attribute.graphs:
                _read_graph(graph)
