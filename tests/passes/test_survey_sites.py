"""The sites of a survey mean exactly what their nodes compute; integer data makes every sum exact."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from onnx_lowrank.files import make_tensor
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.rewrite import patch_of
from onnx_lowrank.sites import Site, Why

Array = npt.NDArray[Any]
EPS = float(np.finfo(np.float32).eps)


def integers(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Small integers: products and sums of them have no rounding, in whatever order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


X, W, B = integers(5, 4, seed=1), integers(4, 3, seed=2), integers(3, seed=3)
IMAGES = {n: integers(2, 4, *(7, 6, 5)[:n], seed=n) for n in (1, 2, 3)}


def model_of(
    nodes: list[onnx.NodeProto], arrays: dict[str, Array], outputs: str = "y", opset: int = 17
) -> onnx.ModelProto:
    """A model whose input x is like `arrays["x"]`, with the other arrays as initializers."""
    x = arrays["x"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [make_tensor(name, array) for name, array in arrays.items() if name != "x"],
    )
    domains = sorted({node.domain for node in nodes if node.domain})
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, ir_version=8, opset_imports=opsets)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"x": x})]


def only_site(model: onnx.ModelProto) -> Site:
    (site,) = survey(Graph(model, Path())).sites
    return site


def rewritten(model: onnx.ModelProto) -> list[onnx.ModelProto]:
    """The model with its site as the dense fragment, and as each kind that factors it as identity times weight."""
    site = only_site(model)
    g, weight = site.geometry, site.weight.astype(np.float64)
    fragments = {"dense": dense_fragment(g, weight, site.bias_vector)}
    for kind in KINDS:
        if kind.applies(g) and kind.split is None and kind.name != "pivot":
            fragments[kind.name] = kind.build(g, np.eye(g.outputs), weight, site.bias_vector)
    assert len(fragments) == 2
    made = []
    for name, fragment in fragments.items():
        graph = Graph(model, Path())
        graph.apply(patch_of(site, fragment, name))
        made.append(graph.commit())
        onnx.checker.check_model(made[-1], full_check=True)
    return made


def holds(model: onnx.ModelProto, x: Array) -> None:
    expected = run(model, x)
    for new in rewritten(model):
        for before, after in zip(expected, run(new, x), strict=True):
            np.testing.assert_array_equal(after, before, strict=True)


# MatMul


def test_a_constant_on_the_right_is_a_site() -> None:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": X, "w": W})
    site = only_site(model)
    assert (site.geometry.side, site.x, site.y, site.nodes, site.bias) == ("right", "x", "y", (0,), None)
    assert np.array_equal(site.weight, W.T)
    holds(model, X)


def test_a_constant_on_the_left_is_a_site() -> None:
    model = model_of([helper.make_node("MatMul", ["w", "x"], ["y"])], {"x": X, "w": integers(3, 5)})
    site = only_site(model)
    assert (site.geometry.side, site.geometry.outputs, site.geometry.inputs, site.x) == ("left", 3, 5, "x")
    holds(model, X)


@pytest.mark.parametrize("operands", [["t", "b"], ["b", "t"]])
def test_the_bias_of_a_matmul_is_taken_in(operands: list[str]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", operands, ["y"])]
    model = model_of(nodes, {"x": integers(2, 5, 4), "w": W, "b": B})
    site = only_site(model)
    assert (site.nodes, site.y, site.geometry.bias) == ((0, 1), "y", True)
    assert np.array_equal(site.bias_vector, B)
    holds(model, integers(2, 5, 4))


@pytest.mark.parametrize(("shape", "outputs"), [((3,), "yt"), ((1, 3), "y"), ((5, 3), "y"), ((1, 1), "y")])
def test_a_bias_that_is_not_a_vector_or_whose_sum_is_read_elsewhere_stays(shape: tuple[int, ...], outputs: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])]
    model = model_of(nodes, {"x": X, "w": W, "b": integers(*shape)}, outputs)
    assert (only_site(model).nodes, only_site(model).bias) == ((0,), None)
    holds(model, X)


# Gemm


@pytest.mark.parametrize(
    ("trans_a", "trans_b", "alpha", "beta", "bias"),
    list(itertools.product((0, 1), (0, 1), (1.0, 0.5), (1.0, -2.0), (None, (3,), (1, 3), (1,), ()))),
)
def test_every_gemm_is_recovered(
    trans_a: int, trans_b: int, alpha: float, beta: float, bias: tuple[int, ...] | None
) -> None:
    arrays = {"x": X.T.copy() if trans_a else X, "w": W.T.copy() if trans_b else W}
    if bias is not None:
        arrays["b"] = integers(*bias, seed=3)
    attributes: dict[str, Any] = {"transA": trans_a, "transB": trans_b, "alpha": alpha, "beta": beta}
    model = model_of([helper.make_node("Gemm", [*arrays], ["y"], **attributes)], arrays)
    site = only_site(model)
    assert np.array_equal(site.weight, alpha * W.T)
    assert np.array_equal(site.bias_vector, np.broadcast_to(beta * arrays.get("b", np.zeros(3)), (1, 3))[0])
    assert site.geometry.trans_a == bool(trans_a)
    holds(model, arrays["x"])


# Conv


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": 2},
        {"dilations": 2},
        {"pads": 1},
        {"strides": 2, "dilations": 2, "pads": 2},
        {"auto_pad": "SAME_UPPER", "strides": 2},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID", "strides": 2},
    ],
)
def test_every_conv_is_recovered(spatial: int, kernel: int, attributes: dict[str, Any]) -> None:
    lengths = {"strides": spatial, "dilations": spatial, "pads": 2 * spatial}
    chosen: dict[str, Any] = {name: [v] * lengths[name] if name in lengths else v for name, v in attributes.items()}
    if "pads" in chosen:
        chosen["pads"][0] = 0
    arrays = {"x": IMAGES[spatial], "w": integers(3, 4, *[kernel] * spatial), "b": B}
    model = model_of([helper.make_node("Conv", [*arrays], ["y"], **chosen)], arrays)
    site = only_site(model)
    assert (site.geometry.outputs, site.geometry.inputs) == (3, 4 * kernel**spatial)
    assert (site.geometry.channels, site.geometry.kernel) == (4, (kernel,) * spatial)
    holds(model, IMAGES[spatial])


def test_a_conv_without_bias_gets_one() -> None:
    arrays = {"x": IMAGES[2], "w": integers(3, 4, 2, 3)}
    model = model_of([helper.make_node("Conv", [*arrays], ["y"], kernel_shape=[2, 3])], arrays)
    assert np.array_equal(only_site(model).bias_vector, np.zeros(3))
    holds(model, IMAGES[2])


# Where weights lie


CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "Constant": ([helper.make_node("Constant", [], ["v"], value=make_tensor("", W))], {}),
    "Transpose": ([helper.make_node("Transpose", ["w"], ["v"])], {"w": W.T.copy()}),
    "Cast": ([helper.make_node("Cast", ["w"], ["v"], to=1)], {"w": W.astype(np.float16)}),
    "Identity": ([helper.make_node("Identity", ["w"], ["v"])], {"w": W}),
    "all": (
        [
            helper.make_node("Constant", [], ["a"], value=make_tensor("", W.T.astype(np.int64))),
            helper.make_node("Identity", ["a"], ["b"]),
            helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
            helper.make_node("Cast", ["c"], ["v"], to=1),
        ],
        {},
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_weight_is_followed_to_its_data(chain: str, op: str) -> None:
    nodes, arrays = CHAINS[chain]
    model = model_of([*nodes, helper.make_node(op, ["x", "v"], ["y"])], {"x": X, **arrays})
    site = only_site(model)
    assert np.array_equal(site.weight, W.T)
    assert site.geometry.dtype == "float32"
    holds(model, X)
    for new in rewritten(model):
        assert {n.op_type for n in new.graph.node} <= {"MatMul", "Gemm"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_weight_keeps_its_dtype(dtype: type[np.generic]) -> None:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": X.astype(dtype), "w": W.astype(dtype)})
    site = only_site(model)
    assert site.geometry.dtype == np.dtype(dtype).name
    assert all(t.data_type == model.graph.initializer[0].data_type for t in rewritten(model)[1].graph.initializer)
    if dtype is not ml_dtypes.bfloat16:  # the CPU has no bfloat16 MatMul
        holds(model, X.astype(dtype))


# BatchNormalization

ORDER = ["t", "gamma", "beta", "mean", "var"]


def normalized(opset: int = 17, outputs: str = "y", more: str = "", **attributes: Any) -> onnx.ModelProto:
    rng = np.random.default_rng(7)
    arrays: dict[str, Array] = {"x": IMAGES[2], "w": rng.standard_normal((3, 4, 3, 3)), "b": rng.standard_normal(3)}
    arrays |= {name: rng.standard_normal(3) for name in ORDER[1:4]} | {"var": rng.uniform(0.1, 2.0, 3)}
    norm = helper.make_node("BatchNormalization", ORDER, ["y", *more.split()], **attributes)
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["t"]), norm]
    return model_of(nodes, {name: array.astype(np.float32) for name, array in arrays.items()}, outputs, opset)


def magnitudes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with absolute constants and −|μ|: the sums of magnitudes that rounding is proportional to."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for tensor in found.graph.initializer:
        value = np.abs(onnx.numpy_helper.to_array(tensor))
        tensor.CopyFrom(make_tensor(tensor.name, -value if tensor.name == "mean" else value))
    return found


@pytest.mark.parametrize("opset", [7, 9, 14, 17])
@pytest.mark.parametrize("attributes", [{}, {"epsilon": 0.5}])
def test_a_normalization_is_folded_exactly(opset: int, attributes: dict[str, Any]) -> None:
    model = normalized(opset, **attributes)
    site = only_site(model)
    assert (site.nodes, site.y) == ((0, 1), "y")
    (expected,), (bound,) = run(model, IMAGES[2]), run(magnitudes(model), np.abs(IMAGES[2]))
    roundings = site.geometry.inputs + 8  # one a product, and the norm's own
    for new in rewritten(model):
        assert not any(n.op_type == "BatchNormalization" for n in new.graph.node)
        assert np.all(np.abs(run(new, IMAGES[2])[0] - expected) <= EPS * roundings * bound)


@pytest.mark.parametrize("power", [0.25, 4.0])
def test_a_norm_by_a_power_of_two_is_folded_to_the_bit(power: float) -> None:
    arrays = {"x": IMAGES[2], "w": integers(3, 4, 1, 1), "gamma": B, "beta": B + 1, "mean": B - 1, "var": B * 0 + power}
    norm = helper.make_node("BatchNormalization", ORDER, ["y"], epsilon=0.0)
    holds(model_of([helper.make_node("Conv", ["x", "w"], ["t"]), norm], arrays), IMAGES[2])


def test_a_normalization_stays_where_its_input_is_an_output_or_is_read_elsewhere() -> None:
    read = normalized()
    read.graph.node.append(helper.make_node("Relu", ["t"], ["u"]))
    read.graph.output.append(helper.make_empty_tensor_value_info("u"))
    for model in (read, normalized(outputs="yt")):
        assert (only_site(model).nodes, only_site(model).y) == ((0,), "t")


def test_a_normalization_in_training_stays() -> None:
    for trained in (
        normalized(training_mode=1),
        normalized(training_mode=1, more="m v"),
        normalized(opset=9, more="m v sm sv"),
    ):
        assert only_site(trained).nodes == (0,)


def test_a_normalization_with_computed_constants_stays() -> None:
    model = normalized()
    model.graph.node.insert(0, helper.make_node("Relu", ["beta"], ["computed"]))
    model.graph.node[2].input[2] = "computed"
    assert only_site(model).nodes == (1,)


@pytest.mark.parametrize(("turned", "alpha"), [(0, 1.0), (1, 1.0), (0, 0.5), (1, -2.0)])
def test_a_fused_matmul_is_a_matmul(turned: int, alpha: float) -> None:
    nodes = [
        helper.make_node("FusedMatMul", ["x", "w"], ["t"], domain="com.microsoft", transB=turned, alpha=alpha),
        helper.make_node("Add", ["b", "t"], ["y"]),
    ]
    model = model_of(nodes, {"x": X, "w": W.T.copy() if turned else W, "b": B})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5, 3]))
    site = only_site(model)
    assert (site.geometry.op, site.geometry.bias, len(site.nodes)) == ("MatMul", True, 2)
    assert (site.weight == alpha * W.T).all()
    before = run(model, X)[0]
    for after in rewritten(model):
        assert [node.op_type for node in after.graph.node if node.domain] == []
        assert run(after, X)[0] == pytest.approx(before, abs=100 * EPS * float(np.abs(before).max()))


@pytest.mark.parametrize("turned", ["transA", "transBatchA", "transBatchB"])
def test_a_fused_matmul_that_turns_its_input_stays(turned: str) -> None:
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")
    node.attribute.append(helper.make_attribute(turned, 1))
    model = model_of([node], {"x": X.T.copy(), "w": W})
    found = survey(Graph(model, Path()))
    assert found.sites == ()
    assert [keep.why for keep in found.kept] == [Why.UNSUPPORTED_OP]


@pytest.mark.parametrize(
    ("weight", "alpha", "why"),
    [
        (np.ones(4, np.float32), 1.0, Why.VECTOR),
        (np.ones((1, 4, 3), np.float32), 1.0, Why.BATCHED),
        (np.full((4, 3), 1e38, np.float32), 10.0, Why.NOT_FINITE),
        (np.ones((4, 3), np.int32), 1.0, Why.DTYPE),
    ],
)
def test_a_fused_matmul_stays_for_the_reasons_of_a_matmul(weight: Array, alpha: float, why: Why) -> None:
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", alpha=alpha)
    found = survey(Graph(model_of([node], {"x": X, "w": weight}), Path()))
    assert [keep.why for keep in found.kept] == [why]
