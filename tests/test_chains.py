"""Hidden layers: found between two sites, with their constants by channel, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.chains import Broken, Chain, chain_after, disjoint_chains
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import survey

MATRIX = "(float[n,6] x) => (float[n,4] z)"
IMAGE = "(float[n,3,9,9] x) => (float[n,4,h,w] z)"
SHAPES = {
    "u": (6, 5), "v": (5, 4), "w": (5, 4), "c": (5,), "row": (1, 5), "one": (1,), "m": (2, 5),
    "s": (5, 3, 3, 3), "t": (4, 5, 3, 3), "d": (5, 1, 3, 3), "db": (5,), "two": (10, 1, 3, 3), "c11": (5, 1, 1),
    "wide": (1, 1, 5), "g1": (5,), "g2": (5,), "g3": (5,), "g4": (5,), "l": (7, 9), "large": (4, 90),
}  # fmt: skip


def graph_of(text: str) -> Graph:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g {text}')
    rng = np.random.default_rng(0)
    body = text.partition("{")[2].replace("(", " ").replace(")", " ").replace(",", " ").split()
    for name, shape in SHAPES.items():
        if name in body:
            model.graph.initializer.append(numpy_helper.from_array(rng.random(shape).astype(np.float32), name))
    return Graph(model, Path())


def first_chain(text: str) -> Chain | Broken:
    graph = graph_of(text)
    sites = survey(graph).sites
    return chain_after(graph, sites[0], {site.nodes[0]: site for site in sites})


@pytest.mark.parametrize(
    ("text", "ops", "axes"),
    [
        (f"{MATRIX} {{ y = MatMul(x, u) z = MatMul(y, v) }}", [], {}),
        (f"{MATRIX} {{ y = MatMul(x, u) e = Abs(y) p = Mul(e, one) q = Mul(p, row) r = PRelu(q, c) z = MatMul(r, v) }}",
         ["Abs", "Mul", "Mul", "PRelu"], {"one": None, "row": 1, "c": 0}),
        (f"{MATRIX} {{ y = MatMul(x, u) p = Div(y, one) e = Erf(p) a = Add(e, one) m2 = Mul(y, a) z = MatMul(m2, v) }}",
         ["Div", "Erf", "Add", "Mul"], {"one": None}),
        (f"{MATRIX} {{ a = Sigmoid(y) r = Mul(y, a) y = MatMul(x, u) z = MatMul(r, v) }}", ["Sigmoid", "Mul"], {}),
        (f"{IMAGE} {{ y = Conv(x, s) r = Relu(y) q = BatchNormalization(r, g1, g2, g3, g4) "
         "e = Conv <group = 5> (q, d, db) p = MaxPool <kernel_shape = [2,2]> (e) a = Add(p, c11) z = Conv(a, t) }",
         ["Relu", "BatchNormalization", "Conv", "MaxPool", "Add"],
         {"g1": 0, "g2": 0, "g3": 0, "g4": 0, "d": 0, "db": 0, "c11": 0}),
    ],
    ids=["nothing between", "constants by channel", "gelu spelled out", "not sorted", "convolutions"],
)  # fmt: skip
def test_a_layer_is_found(text: str, ops: list[str], axes: dict[str, int | None]) -> None:
    chain = first_chain(text)
    assert isinstance(chain, Chain)
    assert [op.op for op in chain.ops] == ops
    assert {name: constant.axis for name, constant in chain.constants.items()} == axes


REFUSED = {
    "output": ("(float[n,6] x) => (float[n,4] z, float[n,5] r) { y = MatMul(x, u) r = Relu(y) z = MatMul(r, v) }",
         Broken.VISIBLE),
    "unread": ("(float[n,6] x) => (float[n,4] z) { y = MatMul(x, u) z = MatMul(k, v) k = Relu(y) o = Exp(k) }",
         Broken.UNREAD),
    "two sites": (f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) a = MatMul(r, v) b = MatMul(r, w) z = Add(a, b) }}",
         Broken.SEVERAL),
    "softmax": (f"{MATRIX} {{ y = MatMul(x, u) r = Softmax(y) z = MatMul(r, v) }}", Broken.MIXED),
    "another reader": (f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) a = MatMul(r, v) b = ReduceMax(y) z = Add(a, b) }}",
         Broken.MIXED),
    "concat": (f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) q = Concat <axis = 0> (r, r) z = MatMul(q, v) }}",
         Broken.MIXED),
    "other domain": (f"{MATRIX} {{ y = MatMul(x, u) r = com.microsoft.FastGelu(y) z = MatMul(r, v) }}", Broken.MIXED),
    "empty input": (f"{MATRIX} {{ y = MatMul(x, u) r = Clip(y, , one) z = MatMul(r, v) }}", Broken.MIXED),
    "subgraph": ("(float[n,6] x, bool k) => (float[n,4] z) { y = MatMul(x, u) r = Relu(y) a = MatMul(r, v) "
         "b = If (k) <then_branch = t1 () => (float[n,5] o) { o = Identity(r) }, "
         "else_branch = e1 () => (float[n,5] p) { p = Identity(r) }> z = Add(a, b) }", Broken.MIXED),
    "two outputs a channel": (f"{IMAGE} {{ y = Conv(x, s) r = Conv <group = 5> (y, two) z = Conv(r, t) }}",
         Broken.MIXED),
    "computed operand": (f"{MATRIX} {{ y = MatMul(x, u) k = Exp(x) r = Mul(y, k) z = MatMul(r, v) }}", Broken.OPERAND),
    "constant by row": (f"{MATRIX} {{ y = MatMul(x, u) r = Mul(y, m) z = MatMul(r, v) }}", Broken.OPERAND),
    "wrong axis": (f"{IMAGE} {{ y = Conv(x, s) r = Add(y, wide) z = Conv(r, t) }}", Broken.OPERAND),
    "a long way": (f"{MATRIX} {{ r0 = MatMul(x, u) " + " ".join(f"r{i + 1} = Relu(r{i})" for i in range(60))
         + " z = MatMul(r60, v) }", Broken.LONG),
    "transposed": (f"{MATRIX} {{ y = MatMul(x, u) r = Relu(y) z = Gemm <transA = 1> (r, l) }}", Broken.LAYOUT),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_is_refused_with_a_reason(name: str) -> None:
    text, why = REFUSED[name]
    assert first_chain(text) is why


def test_every_reason_is_reached() -> None:
    assert {why for _, why in REFUSED.values()} == set(Broken)


def test_a_shared_weight_is_in_no_layer() -> None:
    graph = graph_of(f"{MATRIX} {{ y = MatMul(x, u) q = MatMul(x, u) r = Relu(y) a = Relu(q) z = MatMul(r, v) }}")
    assert disjoint_chains(graph, survey(graph).sites) == ()


def test_no_site_is_in_two_layers_and_the_largest_are_taken() -> None:
    graph = graph_of(
        "(float[n,6] x) => (float[n,9] z) "
        "{ a = MatMul(x, u) b = Relu(a) e = MatMul(b, v) f = Relu(e) z = MatMul(f, large) }"
    )
    (chain,) = disjoint_chains(graph, survey(graph).sites)
    assert (chain.start, chain.end) == ("e", "f")
