"""The survey: every reason to leave a node alone is reachable, and found where it should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.files import make_tensor
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.prepare import Loaded, load
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Keep, Site, Why

W = "float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}"
MATMUL = "y = MatMul(x, w)"
AT_LOAD = {Why.EXCLUDED, Why.NOT_EXECUTED}  # each has its own test below
LATER = {Why.TOO_SMALL, Why.NOT_FASTER, Why.LOSS, Why.GIVEN_BACK, Why.NOT_TIMED}  # decided from data and timings
IN_8_BITS = {Why.IN_FLOAT}  # tests/test_precision.py


def model_of(text: str, weights: str = W, x: str = "float[n, 4] x", opset: int = 17) -> onnx.ModelProto:
    main, _, functions = text.partition("---")
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "local" : 1]>'
    y = f"{x.partition('[')[0]} y"
    return onnx.parser.parse_model(f"{head} main ({x}) => ({y}) <{weights}> {{ {main} }} {functions}")


def surveyed(model: onnx.ModelProto) -> tuple[tuple[Site, ...], tuple[Keep, ...]]:
    found = survey(Graph(model, Path()))
    return found.sites, found.kept


# Reasons


def listed(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))


def given_out(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))


def annotated(model: onnx.ModelProto) -> None:
    model.graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(key="SCALE", value="s")


def sparse(model: onnx.ModelProto) -> None:
    del model.graph.initializer[:]
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "w"), numpy_helper.from_array(np.zeros(1, int))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 2]))


def filled(value: float) -> Callable[[onnx.ModelProto], None]:
    def fill(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].CopyFrom(make_tensor("w", np.array([[1, 2], [3, value]], np.float32)))

    return fill


def nibbles(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(helper.make_tensor("q", TensorProto.INT4, [4, 2], [1, -2, 3, -4, 5, -6, 7, -8]))


def untouched(_: onnx.ModelProto) -> None:
    pass


BRANCH = (
    "<then_branch = a () => (float[n, 2] p) { p = MatMul(x, w) }, else_branch = b () => (float[n, 2] q) { q = OP }>"
)
STORED = "int8[4, 2] q = {1, 2, 3, 4, 5, 6, 7, 8}, float s = {0.5}"
KERNEL = "float[2, 2, 1] w = {1, 2, 3, 4}"
ONE, EMPTY = "float[4] w = {1, 2, 3, 4}", "float[0, 2] w = {}"
SPATIAL = "float[n, 4, 5] x"
CASES: list[tuple[Why, str, dict[str, Any], Callable[[onnx.ModelProto], None]]] = [
    (Why.NOT_LINEAR, "y = Relu(x)", {}, untouched),
    (Why.NOT_LINEAR, "y = local.MatMul(x, w)", {}, untouched),
    (Why.UNSUPPORTED_OP, 'y = Einsum <equation = "nk,km->nm"> (x, w)', {}, untouched),
    (Why.UNSUPPORTED_OP, "y = ConvTranspose <group = 2> (x, w)", {"weights": KERNEL}, untouched),
    (Why.WEIGHT_NOT_CONSTANT, "v = Relu(w)\n y = MatMul(x, v)", {}, untouched),
    (Why.WEIGHT_NOT_CONSTANT, "y = MatMul(x, x)", {}, untouched),
    (Why.WEIGHT_NOT_CONSTANT, "y = Gemm(w, x)", {}, untouched),
    (Why.WEIGHT_NOT_CONSTANT, "w = Constant <value_ints = [1, 2]> ()\n y = MatMul(x, w)", {"weights": ""}, untouched),
    (Why.BATCHED, MATMUL, {"weights": "float[2, 4, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}"}, untouched),
    (Why.VECTOR, MATMUL, {"weights": ONE}, untouched),
    (Why.GROUPED, "y = Conv <group = 4> (x, w)", {"weights": "float[4, 1, 1] w = {1, 2, 3, 4}"}, untouched),
    (Why.SHARED, "y = MatMul(x, w)\n z = Relu(w)", {}, untouched),
    (Why.SHARED, "v = Transpose(w)\n z = Relu(w)\n y = MatMul(x, v)", {}, untouched),
    (Why.IN_BODY, f"y = MatMul(x, w)\n z = If (c) {BRANCH.replace('OP', 'Relu(x)')}", {}, untouched),
    (Why.OVERRIDABLE, MATMUL, {}, listed),
    (Why.OVERRIDABLE, "v = Identity(w)\n y = MatMul(x, v)", {}, listed),
    (Why.IS_OUTPUT, MATMUL, {}, given_out),
    (Why.QUANTIZED, MATMUL, {}, annotated),
    (Why.SPARSE, MATMUL, {}, sparse),
    (Why.DTYPE, MATMUL, {"weights": "int32[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}"}, untouched),
    (Why.DTYPE, "v = Cast <to = 6> (w)\n y = MatMul(x, v)", {}, untouched),
    (Why.DEQUANTIZED, f"w = DequantizeLinear(q, s)\n {MATMUL}", {"weights": STORED}, untouched),
    (
        Why.DEQUANTIZED,
        "v = DequantizeLinear(q, s)\n w = Identity(v)\n y = MatMul(x, w)",
        {"weights": STORED},
        untouched,
    ),
    (
        Why.DEQUANTIZED,
        f"w = DequantizeLinear <axis = 0, block_size = 2> (q, t)\n {MATMUL}",
        {"weights": f"{STORED}, float[2, 2] t = {{1, 2, 3, 4}}", "opset": 21},
        nibbles,
    ),
    (
        Why.WEIGHT_NOT_CONSTANT,
        "p = QuantizeLinear(x, s)\n w = DequantizeLinear(p, s)\n y = MatMul(x, w)",
        {"weights": STORED},
        untouched,
    ),
    (Why.MALFORMED, "y = MatMul(x)", {}, untouched),
    (Why.MALFORMED, "y = Gemm <transB = 1.0> (x, w)", {}, untouched),
    (Why.MALFORMED, "y = Gemm(x, w)", {"weights": ONE}, untouched),
    (Why.MALFORMED, "y = Conv <pads = [1, 1, 1]> (x, w)", {"weights": KERNEL}, untouched),
    (Why.MALFORMED, "y = Conv(x, w)", {"weights": "float w = {1}"}, untouched),
    (Why.MALFORMED, "y = Conv <strides = [0]> (x, w)", {"weights": KERNEL}, untouched),
    (Why.MALFORMED, 'y = Conv <auto_pad = "SAME"> (x, w)', {"weights": KERNEL}, untouched),
    (Why.NOT_FINITE, MATMUL, {"weights": ONE}, filled(np.nan)),
    (Why.NOT_FINITE, MATMUL, {"weights": ONE}, filled(-np.inf)),
    (Why.EMPTY, MATMUL, {"weights": EMPTY}, untouched),
    (Why.BIAS, "y = Gemm(x, w, b)", {"weights": f"{W}, float[3, 2] b = {{1, 2, 3, 4, 5, 6}}"}, untouched),
    (Why.BIAS, "y = Gemm(x, w, b)", {"weights": f"{W}, float[2, 1] b = {{1, 2}}"}, untouched),
    (Why.BIAS, "y = Gemm(x, w, x)", {}, untouched),
    (
        Why.BIAS,
        "b = Relu(c)\n y = Conv(x, w, b)",
        {"weights": "float[2, 2, 1] w = {1, 2, 3, 4}, float[2] c = {1, 2}"},
        untouched,
    ),
    (Why.OPSET, MATMUL, {"opset": 6}, untouched),
]
INNER = f"y = Relu(x)\n z = If (c) {BRANCH.replace('OP', 'Gemm(x, w)')}"
FUNCTION = 'y = Relu(x) --- <domain: "local", opset_import: ["" : 17]> f (a, v) => (r) { r = MatMul(a, v) }'
NESTED: list[tuple[Why, str, list[str]]] = [
    (Why.SUBGRAPH, INNER, ["MatMul", "Gemm"]),
    (
        Why.SUBGRAPH,
        INNER.replace("Gemm(x, w)", f"If (c) {BRANCH.replace('OP', 'Relu(x)')}"),
        ["MatMul", "If", "MatMul", "Relu"],
    ),
    (Why.FUNCTION, FUNCTION, ["MatMul"]),
]


@pytest.mark.parametrize(("why", "text", "options", "edit"), CASES)
def test_a_node_stays_for_the_right_reason(
    why: Why, text: str, options: dict[str, Any], edit: Callable[[onnx.ModelProto], None]
) -> None:
    model = model_of(text, **options)
    edit(model)
    sites, kept = surveyed(model)
    assert sites == ()
    op = next(n.op_type for n in model.graph.node if n.output[0] == "y")
    assert Keep("y", op, why) in kept


@pytest.mark.parametrize(("why", "text", "ops"), NESTED)
def test_nodes_of_bodies_and_functions_stay(why: Why, text: str, ops: list[str]) -> None:
    sites, kept = surveyed(model_of(text))
    assert sites == ()
    assert [k.op for k in kept if k.why is why] == ops


def loaded(folder: Path, text: str, x: npt.NDArray[np.float32], **choices: Any) -> Loaded:
    path = folder / "model.onnx"
    model = model_of(text)
    for position, node in enumerate(model.graph.node):
        node.name = f"node{position}"
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    return load(path, [{"x": x}] * 2, Settings(**choices, cache=folder), lambda *_: None)


@pytest.mark.parametrize(
    ("choices", "site"),
    [
        ({}, "node0"),
        ({"include": ("no*", "other")}, "node0"),
        ({"include": ("other",)}, None),
        ({"exclude": ("node[0-3]",)}, None),
        ({"include": ("node0",), "exclude": ("NODE0",)}, "node0"),
        ({"include": ("node0",), "exclude": ("*",)}, None),
    ],
)
def test_sites_are_chosen_by_globs_on_their_names(tmp_path: Path, choices: dict[str, Any], site: str | None) -> None:
    found = loaded(tmp_path, MATMUL, np.ones((3, 4), np.float32), **choices)
    assert [s.name for s in found.sites] == ([site] if site else [])
    assert found.kept == (() if site else (Keep("node0", "MatMul", Why.EXCLUDED),))


@pytest.mark.parametrize("rows", [0, 3])
def test_a_node_that_computes_nothing_counts_as_never_executed(tmp_path: Path, rows: int) -> None:
    text = (
        f"a = Constant <value = int64[1] {{0}}> ()\n b = Constant <value = int64[1] {{{rows}}}> ()\n"
        "s = Slice(x, a, b)\n y = MatMul(s, w)"
    )
    found = loaded(tmp_path, text, np.ones((3, 4), np.float32))
    assert (Keep("node3", "MatMul", Why.NOT_EXECUTED) in found.kept) == (rows == 0)
    assert [s.geometry.x_shape for s in found.sites] == ([] if rows == 0 else [(3, 4)])


def test_every_reason_is_reached_by_a_test() -> None:
    assert {case[0] for case in (*CASES, *NESTED)} | AT_LOAD | LATER | IN_8_BITS == set(Why)
