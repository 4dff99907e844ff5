"""Every kind: exact at full rank, Eckart–Young at any other, valid ONNX, cheaper than dense, of the right type."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import strategies as st

from onnx_lowrank.fragment import Fragment, Kind, dtype_of
from onnx_lowrank.latency import fragment_model
from onnx_lowrank.linalg import correct_bias, end_pivots, factor_gram
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.conv_svd import CONV_SVD
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.runtime import Session
from onnx_lowrank.sites import Geometry

EPS = float(np.finfo(np.float32).eps)
MATMUL = Geometry("MatMul", 12, 20, "float32", True, 17, x_shape=(3, 40, 20))
CONV = Geometry(
    "Conv", 10, 54, "float32", True, 17, channels=6, kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1, 1, 1, 1),
    x_shape=(2, 6, 13, 11),
)  # fmt: skip
POINTWISE = dataclasses.replace(CONV, inputs=6, kernel=(1, 1), pads=(0, 0, 0, 0))
GEOMETRIES = {
    "matmul": MATMUL,
    "matmul without bias": dataclasses.replace(MATMUL, bias=False),
    "matmul of matrices": dataclasses.replace(MATMUL, x_shape=(90, 20)),
    "constant on the left": dataclasses.replace(MATMUL, side="left", bias=False, x_shape=(3, 20, 40)),
    "gemm": dataclasses.replace(MATMUL, op="Gemm", x_shape=(90, 20)),
    "gemm transA": dataclasses.replace(MATMUL, op="Gemm", trans_a=True, x_shape=(20, 90)),
    "tall": dataclasses.replace(MATMUL, outputs=20, inputs=12, x_shape=(90, 12)),
    "pointwise": POINTWISE,
    "pointwise, strided": dataclasses.replace(POINTWISE, strides=(2, 3)),
    "conv": CONV,
    "conv, strided, dilated": dataclasses.replace(CONV, strides=(2, 1), dilations=(2, 1), pads=(2, 0, 1, 1)),
    "conv, same": dataclasses.replace(CONV, strides=(2, 2), auto_pad="SAME_UPPER", pads=(0, 0, 0, 0)),
    "conv of a line": dataclasses.replace(
        CONV, inputs=18, kernel=(3,), strides=(2,), dilations=(1,), pads=(1, 0), x_shape=(2, 6, 41)
    ),
    "conv of a volume": dataclasses.replace(
        CONV, inputs=48, kernel=(2, 2, 2), strides=(1,) * 3, dilations=(1,) * 3, pads=(0,) * 6, x_shape=(2, 6, 5, 6, 4)
    ),
}
LOW_RANK = [kind for kind in KINDS if kind.split is None]
CASES = [
    pytest.param(kind, geometry, id=f"{kind.name}: {name}")
    for kind in LOW_RANK
    for name, geometry in GEOMETRIES.items()
    if kind.applies(geometry)
]
APPLYING = [(kind, geometry) for kind in LOW_RANK for geometry in GEOMETRIES.values() if kind.applies(geometry)]
each = pytest.mark.parametrize(("kind", "geometry"), CASES)


@dataclasses.dataclass(frozen=True)
class Example:
    """Input, weight N×K, bias, and the dense site's output as positions × N."""

    x: npt.NDArray[Any]
    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]


def flat(geometry: Geometry, y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    axis = 1 if geometry.op == "Conv" else (-2 if geometry.side == "left" else -1)
    return np.moveaxis(y, axis, -1).reshape(-1, geometry.outputs).astype(np.float64)


def ran(fragment: Fragment, geometry: Geometry, x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return flat(geometry, np.asarray(Session(fragment_model(fragment, geometry)).run({"x": x})[0]))


def example(geometry: Geometry, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(geometry.x_shape) + 0.5).astype(dtype_of(geometry))
    weight = rng.standard_normal((geometry.outputs, geometry.inputs))
    bias = rng.standard_normal(geometry.outputs) if geometry.bias else np.zeros(geometry.outputs)
    return Example(x, weight, bias, ran(dense_fragment(geometry, weight, bias), geometry, x))


@each
def test_full_rank_is_exact(kind: Kind, geometry: Geometry) -> None:
    given = example(geometry)
    left, _, _ = np.linalg.svd(given.weight, full_matrices=False)
    fragment = kind.build(geometry, left, left.T @ given.weight, given.bias)
    # Two products of length K and N; pivots multiply the rounding of the first by their coefficients.
    amplified = max(float(np.abs(end_pivots(left)[2]).max(initial=0.0)), 1.0) if kind is PIVOT else 1.0
    slack = 8 * EPS * amplified * (geometry.inputs + geometry.outputs) * np.abs(given.y).max()
    assert np.abs(ran(fragment, geometry, given.x) - given.y).max() <= slack


@each
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_what_eckart_and_young_say(kind: Kind, geometry: Geometry, rank: int) -> None:
    given = example(geometry)
    linear = given.y - given.bias
    centre = linear.mean(axis=0) if geometry.bias else np.zeros(geometry.outputs)
    gram = (linear - centre).T @ (linear - centre) / len(linear)
    found = factor_gram(gram)
    left, right = found.pair(given.weight, rank)
    bias = correct_bias(left, left.T, centre, centre + given.bias) if geometry.bias else given.bias
    measured = np.sum((ran(kind.build(geometry, left, right, bias), geometry, given.x) - given.y) ** 2) / len(linear)
    assert measured == pytest.approx(found.error(rank), rel=1e-4, abs=1e3 * EPS**2 * found.total)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.sampled_from(APPLYING), st.integers(0, 2**32 - 1))
def test_more_rank_is_never_worse(case: tuple[Kind, Geometry], seed: int) -> None:
    """On the inputs that were fitted to: what theory says of the error, and what the runtime makes of the fragment."""
    kind, geometry = case
    known = example(geometry, seed)
    linear = known.y - known.bias
    centre = linear.mean(axis=0) if geometry.bias else np.zeros(geometry.outputs)
    found = factor_gram((linear - centre).T @ (linear - centre) / len(linear))
    expected, errors = [], []
    for rank in range(1, kind.full(geometry) + 1):
        left, right = found.pair(known.weight, rank)
        bias = correct_bias(left, left.T, centre, centre + known.bias) if geometry.bias else known.bias
        amplified = max(float(np.abs(end_pivots(left)[2]).max(initial=0.0)), 1.0) if kind is PIVOT else 1.0
        lost = ran(kind.build(geometry, left, right, bias), geometry, known.x) - known.y
        expected.append(found.relative(rank))
        errors.append(float(np.sum(lost**2)) / len(lost) / found.total)
        rounding = (8 * EPS * amplified * (geometry.inputs + geometry.outputs)) ** 2
        assert rank == 1 or errors[-1] <= errors[-2] * (1 + 1e-4) + rounding
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == pytest.approx(0, abs=1e-12)
    assert errors[-1] <= rounding


@each
def test_the_fragment_is_valid_onnx(kind: Kind, geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape) for shape in kind.shapes(geometry, 2))
    model = fragment_model(kind.build(geometry, first, second, np.zeros(geometry.outputs)), geometry)
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * len(geometry.x_shape))
    model.graph.output[0].CopyFrom(out)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)


@each
def test_the_largest_rank_is_the_last_that_saves_work(kind: Kind, geometry: Geometry) -> None:
    dense, rank = geometry.outputs * geometry.inputs, kind.max_rank(geometry)
    assert 0 < rank < kind.full(geometry)
    assert kind.cost(geometry, rank) < dense
    assert rank + 1 == kind.full(geometry) or kind.cost(geometry, rank + 1) >= dense


@each
@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_constants_have_the_models_type(kind: Kind, geometry: Geometry, dtype: str) -> None:
    typed = dataclasses.replace(geometry, dtype=dtype)
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape) for shape in kind.shapes(typed, 3))
    fragment = kind.build(typed, first, second, rng.standard_normal(geometry.outputs))
    expected = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    assert {array.dtype for array in fragment.constants.values()} - {np.dtype(np.int64)} == {np.dtype(expected)}


def test_every_geometry_has_a_kind_and_pointwise_ones_are_no_convolution_to_split() -> None:
    assert all(any(kind.applies(g) for kind in LOW_RANK) for g in GEOMETRIES.values())
    assert not SVD.applies(CONV)
    assert not CONV_SVD.applies(POINTWISE)
    assert not CONV_SVD.applies(MATMUL)


def test_pivots_stay_in_order_without_a_gather() -> None:
    rng = np.random.default_rng(1)
    left = np.linalg.qr(rng.standard_normal((30, 7)))[0]
    geometry = dataclasses.replace(MATMUL, outputs=30)
    fragment = PIVOT.build(geometry, left, rng.standard_normal((7, 20)), np.zeros(30))
    assert [op.op for op in fragment.ops] == ["MatMul", "MatMul", "Concat", "Add"]


@pytest.mark.parametrize(("dtype", "usable"), [("float32", True), ("float16", False)])
def test_pivots_that_amplify_the_rounding_of_the_stored_type_are_refused(dtype: str, usable: bool) -> None:
    left = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 7)))[0]
    assert PIVOT.usable(dataclasses.replace(MATMUL, dtype=dtype), left) is usable
    left[[0, -1]] = 0.0
    left[[0, -1], 0] = 1e-7
    assert not PIVOT.usable(dataclasses.replace(MATMUL, dtype=dtype), left)
