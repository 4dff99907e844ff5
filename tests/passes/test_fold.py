"""Constants by channel behind a linear node: folded exactly, in any order, and left alone for a reason."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.sites import Site

Array = npt.NDArray[Any]
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)
HEADS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, list[tuple[int, ...]]]] = {
    # input, weight, channels, shapes of constants that go by channel
    "Conv": ((2, 3, 6, 5), (4, 3, 3, 3), 4, [(4, 1, 1), (1, 4, 1, 1), (), (1,), (1, 1, 1, 1)]),
    "ConvTranspose": ((2, 3, 6, 5), (3, 4, 2, 2), 4, [(4, 1, 1), (1, 4, 1, 1), ()]),
    "MatMul": ((2, 5, 3), (3, 4), 4, [(4,), (), (1,)]),
    "FusedMatMul": ((2, 5, 3), (3, 4), 4, [(4,), ()]),
    "Gemm": ((5, 3), (3, 4), 4, [(4,), (1, 4), (), (1, 1)]),
}


def model_of(head: str, steps: list[tuple[str, Array, bool]], *more: onnx.NodeProto) -> tuple[onnx.ModelProto, Array]:
    """A linear node, then operators with constants, on the right where the flag says so."""
    shape, weight, *_ = HEADS[head]
    x = RNG.standard_normal(shape).astype(np.float32)
    domain = "com.microsoft" if head == "FusedMatMul" else ""
    nodes = [helper.make_node(head, ["x", "w"], ["t0"], domain=domain)]
    arrays = {"w": RNG.standard_normal(weight)}
    for i, (op, constant, right) in enumerate(steps):
        arrays[f"c{i}"] = constant
        nodes.append(helper.make_node(op, [f"t{i}", f"c{i}"] if right else [f"c{i}", f"t{i}"], [f"t{i + 1}"]))
    nodes += [helper.make_node("Identity", [f"t{len(steps)}"], ["y"]), *more]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), x


def only_site(model: onnx.ModelProto) -> Site:
    (site,) = survey(Graph(model, Path())).sites
    return site


def run(model: onnx.ModelProto, x: Array) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0], np.float64)


def written(model: onnx.ModelProto, site: Site) -> onnx.ModelProto:
    graph = Graph(model, Path())
    fragment = dense_fragment(site.geometry, site.weight.astype(np.float64), site.bias_vector)
    graph.apply(Patch(site.name, site.nodes, site.x, site.y, fragment, "dense"))
    return graph.commit()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(HEADS)), st.integers(0, 2**32 - 1))
def test_any_chain_of_constants_by_channel_becomes_part_of_the_site(head: str, seed: int) -> None:
    rng, values = random.Random(seed), np.random.default_rng(seed)
    shapes = HEADS[head][3]
    steps = []
    for _ in range(rng.randint(1, 5)):
        op = rng.choice(["Add", "Sub", "Mul", "Div"])
        constant = values.uniform(0.5, 2, rng.choice(shapes)) * values.choice([-1, 1])
        steps.append((op, np.asarray(constant), op == "Div" or rng.random() < 0.5))
    model, x = model_of(head, steps)
    site, y = only_site(model), run(model, x)
    assert site.nodes == tuple(range(len(steps) + 1))
    assert site.y == f"t{len(steps)}"
    after = written(model, site)
    bias = ["Add"] if site.geometry.op == "MatMul" and site.bias is not None else []
    assert [n.op_type for n in after.graph.node] == [site.geometry.op, *bias, "Identity"]
    assert (site.bias is None) == ("MatMul" in head and not {op for op, *_ in steps} & {"Add", "Sub"})
    assert np.abs(run(after, x) - y).max() <= 1000 * EPS * max(1, np.abs(y).max())


def test_a_norm_between_constants_becomes_part_too() -> None:
    model, x = model_of("Conv", [("Mul", np.full((4, 1, 1), 2.0), True), ("Add", np.ones((4, 1, 1)), True)])
    model.graph.node.insert(2, helper.make_node("BatchNormalization", ["t1", "a", "b", "a", "a"], ["n"]))
    model.graph.node[3].input[0] = "n"
    for name in "ab":
        model.graph.initializer.append(numpy_helper.from_array(np.abs(RNG.standard_normal(4)).astype(np.float32), name))
    site = only_site(model)
    assert site.nodes == (0, 1, 2, 3)
    assert run(written(model, site), x) == pytest.approx(run(model, x), abs=1e-4)


@pytest.mark.parametrize(
    ("head", "op", "constant", "right"),
    [
        ("Conv", "Add", np.ones(5), True),  # along the last axis of the image
        ("Conv", "Mul", np.ones((4, 1, 5)), True),
        ("Conv", "Mul", np.ones((1, 1, 4, 1, 1)), True),  # gives the output an axis
        ("Conv", "Mul", np.ones((1, 1, 1, 1, 1)), True),
        ("Conv", "Div", np.ones((4, 1, 1)), False),  # 1 ÷ y
        ("Conv", "Div", np.array([1.0, 0, 1, 1]).reshape(4, 1, 1), True),
        ("Conv", "Mul", np.full((4, 1, 1), np.inf), True),
        ("Conv", "Pow", np.full((4, 1, 1), 2.0), True),
        ("MatMul", "Mul", np.ones((1, 4)), True),  # a vector x would give a matrix
        ("MatMul", "Add", np.ones((5, 4)), True),
        ("Gemm", "Add", np.ones((5, 1)), True),
    ],
)
def test_what_does_not_go_by_channel_stays(head: str, op: str, constant: Array, right: bool) -> None:
    model, _ = model_of(head, [(op, constant, right)])
    assert only_site(model).nodes == (0,)


def test_a_product_that_its_type_cannot_hold_stays() -> None:
    model, _ = model_of("MatMul", [("Mul", np.full(4, 1e20), True), ("Mul", np.full(4, 1e30), True)])
    assert only_site(model).nodes == (0, 1)


def test_what_is_read_twice_stays() -> None:
    model, _ = model_of("Conv", [("Mul", np.ones((4, 1, 1)), True)])
    model.graph.node[1].input[1] = "t0"
    assert only_site(model).nodes == (0,)
    model, _ = model_of("Conv", [("Mul", np.ones((4, 1, 1)), True)], helper.make_node("Relu", ["t0"], ["r"]))
    assert only_site(model).nodes == (0,)
