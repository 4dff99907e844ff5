"""Fragments as models that run alone, once or many times in one graph."""

from __future__ import annotations

import math

import onnx
from onnx import helper, numpy_helper

from onnx_lowrank.fragment import Fragment, X, dtype_of
from onnx_lowrank.sites import Geometry

_LEAST_MS, _MOST_REPEATS, _REPEAT_BYTES = 1.0, 64, 128 << 20


def fragment_model(fragment: Fragment, geometry: Geometry, copies: int = 1) -> onnx.ModelProto:
    """A model that is one fragment: from `x` of the geometry's shape to its outputs, or to the activation after each.

    Args:
        copies: so many of it side by side, each with its own input, constants and output, so that the runtime can
            merge none of them; those of the n-th end in `_n`.
    """
    nodes, inputs, outputs, constants = [], [], [], []
    dtype = helper.np_dtype_to_tensor_dtype(dtype_of(geometry))
    for end in ["", *(f"_{n}" for n in range(1, copies))]:
        for op in fragment.ops:
            reads = [name + end if name else "" for name in op.inputs]
            label = f"{op.owner}{op.name}{end}"
            nodes.append(helper.make_node(op.op, reads, [op.output + end], name=label, **op.attributes))
        for local in fragment.outputs:
            out = local + end
            if geometry.then:
                out = f"activated_{local}{end}"
                nodes.append(helper.make_node(geometry.then, [local + end], [out], name=f"then_{local}{end}"))
            outputs.append(onnx.ValueInfoProto(name=out))
        constants += [numpy_helper.from_array(array, name + end) for name, array in fragment.constants.items()]
        inputs.append(helper.make_tensor_value_info(X + end, dtype, geometry.x_shape))
    graph = helper.make_graph(nodes, "fragment", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", geometry.opset)], ir_version=8)


def copies_for(ms: float, held: int) -> int:
    """How many copies of a fragment make a run of a millisecond.

    A run that is only a launch or two would show the clock and the launch of the run itself.

    Args:
        ms: of one alone.
        held: its bytes.
    """
    fitting = max(_REPEAT_BYTES // max(held, 1), 1)
    return max(min(math.ceil(_LEAST_MS / max(ms, 1e-6)), _MOST_REPEATS, fitting), 1)
