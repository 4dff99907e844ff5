"""What must hold before a model is read any further: names are text, and nodes have the inputs of their operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import onnx

from onnx_lowrank.errors import ModelError

_ARITY: Final = {
    "MatMul": (2, 2),
    "FusedMatMul": (2, 2),
    "Gemm": (2, 3),
    "FusedGemm": (2, 3),
    "Conv": (2, 3),
    "FusedConv": (2, 4),
    "ConvTranspose": (2, 3),
}
_TYPES: Final = {
    **dict.fromkeys(("group", "transA", "transB", "transBatchA", "transBatchB"), onnx.AttributeProto.INT),
    **dict.fromkeys(("alpha", "beta"), onnx.AttributeProto.FLOAT),
    **dict.fromkeys(
        ("kernel_shape", "strides", "dilations", "pads", "output_padding", "output_shape"), onnx.AttributeProto.INTS
    ),
    **dict.fromkeys(("auto_pad", "activation"), onnx.AttributeProto.STRING),
    **dict.fromkeys(("activation_alpha", "activation_beta", "activation_gamma"), onnx.AttributeProto.FLOAT),
    "activation_params": onnx.AttributeProto.FLOATS,
}
_PER_AXIS: Final = ("strides", "dilations", "output_padding")
_AUTO_PADS: Final = (b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID")


def check_text(model: onnx.ModelProto, where: str) -> None:
    """Refuse names and other texts that are not UTF-8, as files have them that lost or gained a byte.

    Raises:
        ModelError: naming the file.
    """
    if not all(isinstance(text, str) for text in _texts(model)):  # protobuf gives bytes where it cannot decode
        raise ModelError(f"'{where}' is damaged: a name in it is not text (UTF-8); export or download it again")


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
    long = all(len(given.get(name, (1,) * axes)) == axes for name in (*_PER_AXIS, "kernel_shape"))
    fits = (
        tuple(given.get("kernel_shape", kernel)) == tuple(kernel)
        and len(given.get("pads", (0,) * 2 * axes)) == 2 * axes
    )
    positive = all(n >= 1 for name in ("strides", "dilations") for n in given.get(name, ()))
    return long and fits and positive and axes >= 1 and all(n >= 0 for n in given.get("output_padding", ()))


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string)
    yield from (text for p in model.metadata_props for text in (p.key, p.value))
    yield from (opset.domain for opset in model.opset_import)
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from (function.name, function.domain, function.doc_string, *function.input, *function.output)
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[object]:
    yield from (graph.name, graph.doc_string)
    for tensor in graph.initializer:
        yield from (tensor.name, tensor.doc_string)
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for sparse in graph.sparse_initializer:
        yield sparse.values.name
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from (value.name, value.doc_string)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[object]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, node.doc_string, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            if attribute.HasField("t"):
                yield attribute.t.name
                yield from (text for entry in attribute.t.external_data for text in (entry.key, entry.value))
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _in_graph(graph)
