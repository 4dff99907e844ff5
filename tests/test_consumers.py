"""Who reads a site's output: found through elementwise operators, refused where anything else looks on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.consumers import readers
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import survey

HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '
MATRIX = "(float[n,6] x) => (float[n,6] z)"
IMAGE = "(float[n,6,9,9] x) => (float[n,6,h,w] z)"
WEIGHTS = {"u": (6, 6), "v": (6, 6), "s": (6, 6, 3, 3), "t": (6, 6, 3, 3), "w": (6, 6), "c": (6,)}


def found(text: str) -> list[tuple[str, str]]:
    """Weight of every reader of the first site, and the image that it reads."""
    model = onnx.parser.parse_model(HEAD + text)
    rng = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        if f" {name})" in text or f" {name}," in text:
            model.graph.initializer.append(numpy_helper.from_array(rng.random(shape).astype(np.float32), name))
    graph = Graph(model, Path())
    sites = survey(graph).sites
    at = {site.nodes[0]: site for site in sites}
    return [(graph.protos[r.site.nodes[0]].input[1], r.image) for r in readers(graph, sites[0], at)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{MATRIX} {{ y = MatMul(x, u) z = MatMul(y, v) }}", [("v", "y")]),
        (f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) z = MatMul(r, v) }}", [("v", "r")]),
        (f"{MATRIX} {{ y = MatMul(x, u) a = Sigmoid(y) r = Mul(y, a) z = MatMul(r, v) }}", [("v", "r")]),
        (
            f"{MATRIX} <float two = {{1.41}}, float one = {{1}}> {{ y = MatMul(x, u) d = Div(y, two) e = Erf(d) "
            "f = Add(e, one) r = Mul(y, f) z = MatMul(r, v) }",
            [("v", "r")],
        ),
        (f"{IMAGE} {{ y = Conv(x, s) r = Relu(y) z = Conv(r, t) }}", [("t", "r")]),
        (
            f"{IMAGE} {{ y = Conv(x, s) r = Relu(y) p = MaxPool <kernel_shape = [2,2]> (r) z = Conv(p, t) }}",
            [("t", "r")],
        ),
    ],
    ids=["nothing between", "relu", "silu", "gelu spelled out", "convolutions", "pooled"],
)
def test_the_reader_is_found_behind_what_treats_elements_alone(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


def test_several_readers_are_all_found() -> None:
    text = f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) a = MatMul(r, v) b = MatMul(r, w) z = Add(a, b) }}"
    assert sorted(found(text)) == [("v", "r"), ("w", "r")]


@pytest.mark.parametrize(
    "text",
    [
        "(float[n,6] x) => (float[n,6] z, float[n,6] y) { y = MatMul(x, u) z = MatMul(y, v) }",
        f"{MATRIX} {{ y = MatMul(x, u) r = Softmax(y) z = MatMul(r, v) }}",
        f"{MATRIX} {{ y = MatMul(x, u) q = Relu(y) r = Mul(q, c) z = MatMul(r, v) }}",
        f"{MATRIX} {{ y = MatMul(x, u) r = Mul(y, x) z = MatMul(r, v) }}",
        f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) m = MatMul(r, v) z = Add(m, r) }}",
        f"{MATRIX} {{ y = MatMul(x, u) q = Transpose(y) z = MatMul(q, v) }}",
        f"{MATRIX} {{ y = MatMul(x, u) z = Gemm <transA = 1> (y, v) }}",
        f"{IMAGE} {{ y = Conv(x, s) p = MaxPool <kernel_shape = [2,2]> (y) r = Relu(p) z = Conv(r, t) }}",
        f"{MATRIX} {{ z = MatMul(x, u) }}",
    ],
    ids=[
        "an output",
        "softmax",
        "scaled by channel",
        "gated",
        "a skip",
        "transposed",
        "transA",
        "pooled first",
        "last",
    ],
)
def test_anything_else_that_reads_leaves_the_plain_metric(text: str) -> None:
    assert found(text) == []
