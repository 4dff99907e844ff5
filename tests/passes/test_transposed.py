"""ConvTranspose and batches of matrices: sites that mean what their nodes compute, factors with the error of theory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_lowrank.calibration import factorize, fitted
from onnx_lowrank.fragment import Fragment
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.linalg import grouped_product
from onnx_lowrank.measure import multiply_adds
from onnx_lowrank.moments import Moments, rows
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.refit import groups
from onnx_lowrank.run import Clock, start
from onnx_lowrank.runtime import profile
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site, Why

Array = npt.NDArray[Any]
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)
DISJOINT: dict[str, dict[str, Any]] = {
    "upsampling": {"strides": [2, 2]},
    "gaps": {"strides": [3, 2], "output_padding": [1, 0]},
    "rows of one": {"strides": [2, 3], "kernel": (1, 2), "dilations": [1, 2]},
    "pointwise": {"kernel": (1, 1)},
    "line": {"kernel": (3,), "strides": [3]},
    "volume": {"kernel": (2, 1, 2), "strides": [2, 1, 2]},
}
OVERLAPPING: dict[str, dict[str, Any]] = {
    "plain": {"kernel": (3, 3)},
    "smooth upsampling": {"kernel": (4, 4), "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "cut off": {"strides": [2, 2], "pads": [1, 0, 0, 1]},
    "padded": {"kernel": (3, 3), "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    "dilated": {"strides": [2, 2], "dilations": [2, 3]},
    "same": {"kernel": (3, 3), "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "line": {"kernel": (5,), "strides": [2], "pads": [0, 2]},
}
CASES = [(f"{name}, {scatters}", scatters, case) for scatters, found in ((True, DISJOINT), (False, OVERLAPPING))
         for name, case in found.items()]  # fmt: skip
cases = pytest.mark.parametrize(("scatters", "case"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def model_of(node: onnx.NodeProto, x: Array, weights: dict[str, Array], *more: onnx.NodeProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node, *more], "g",
        [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def transposed(case: dict[str, Any], channels: int = 5, outputs: int = 4) -> tuple[onnx.ModelProto, Array]:
    given = dict(case)
    kernel = given.pop("kernel", (2, 2))
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((3, channels, *(9, 8, 4)[: len(kernel)])).cumsum(axis=1) + 0.5).astype(np.float32)
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], name="up", **given)
    weights = {"w": rng.standard_normal((channels, outputs, *kernel)), "b": rng.standard_normal(outputs)}
    return model_of(node, x, {k: v.astype(np.float32) for k, v in weights.items()}), x


def run(model: onnx.ModelProto, x: Array) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0], np.float64)


def only_site(model: onnx.ModelProto, x: Array) -> Site:
    (site,) = survey(Graph(model, Path())).sites
    return site.seen((x.shape,))


def patched(model: onnx.ModelProto, site: Site, fragment: Fragment) -> onnx.ModelProto:
    graph = Graph(model, Path())
    graph.apply(Patch(site.name, site.nodes, site.x, site.y, fragment, "svd"))
    committed = graph.commit()
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(committed, strict_mode=True), full_check=True)
    return committed


def kind_of(site: Site) -> Any:
    (kind,) = [kind for kind in KINDS if kind.applies(site.geometry)]
    return kind


def fit_of(site: Site, x: Array, y: Array) -> Any:
    vectors = rows(x if site.tap == "input" else y, site.channel_axis)
    moments = Moments(vectors.shape[1])
    moments.add(vectors)
    return factorize(site, moments)


@cases
def test_the_site_is_what_the_node_computes(scatters: bool, case: dict[str, Any]) -> None:
    model, x = transposed(case)
    site, y = only_site(model, x), run(model, x)
    assert (site.geometry.scatters, site.tap) == (scatters, "input" if scatters else "output")
    again = run(patched(model, site, dense_fragment(site.geometry, site.weight, site.bias_vector)), x)
    assert again.shape == y.shape
    assert np.abs(again - y).max() <= 100 * EPS * np.abs(y).max()


@cases
def test_the_error_of_its_outputs_is_that_of_the_left_out_values_at_every_rank(
    scatters: bool, case: dict[str, Any]
) -> None:
    model, x = transposed(case)
    site, y = only_site(model, x), run(model, x)
    fit, kind = fit_of(site, x, y), kind_of(site)
    assert kind.name == ("svd" if scatters else "conv_svd")
    positions = x.size // x.shape[1] if scatters else y.size // y.shape[1]
    last = np.inf
    for rank in range(1, kind.full(site.geometry) + 1):
        left, right, bias = fitted(site, fit, rank)
        assert (left.shape, right.shape) == kind.shapes(site.geometry, rank)
        out = run(patched(model, site, kind.build(site.geometry, left, right, bias)), x)
        measured, theory = float(np.sum((out - y) ** 2)) / positions, fit.factorization.error(rank)
        assert measured == pytest.approx(theory, rel=1e-3, abs=1e4 * EPS**2 * fit.factorization.total)
        assert theory <= last * (1 + 1e-12)
        last = theory
    assert last == pytest.approx(0, abs=1e-9 * fit.factorization.total)


@cases
def test_it_costs_the_multiply_adds_that_it_runs(scatters: bool, case: dict[str, Any]) -> None:
    model, x = transposed(case, 8, 12)
    site, rank = only_site(model, x), 2
    kind, geometry = kind_of(site), site.geometry
    parts = [RNG.standard_normal(shape) for shape in kind.shapes(geometry, rank)]
    fragment = kind.build(geometry, *parts, np.zeros(geometry.outputs))
    assert [op.op for op in fragment.ops] == (["Conv", "ConvTranspose"] if scatters else ["ConvTranspose", "Conv"])
    ran = profile(patched(model, site, fragment), {"x": x}, folder=Path())
    inputs = x.size // x.shape[1]
    outputs = {n: r for n, r in ran.items() if r.op == "Conv"}[0 if scatters else 1].output_shapes[0]
    strided = inputs * int(np.prod(geometry.strides)) / (int(np.prod(outputs)) // outputs[1])
    exact = multiply_adds(ran)
    if scatters:
        assert exact == inputs * kind.macs(geometry, rank)
    else:  # outputs are as many as inputs times strides, but for the edges
        down = inputs * rank * geometry.inputs
        assert exact - down == pytest.approx((inputs * kind.macs(geometry, rank) - down) / strided)
    assert 0 < kind.max_rank(geometry) < kind.full(geometry)


def test_a_normalization_behind_it_becomes_part_of_it() -> None:
    model, x = transposed(DISJOINT["upsampling"])
    model.graph.node[0].output[0] = "t"
    norm = helper.make_node("BatchNormalization", ["t", "gamma", "beta", "mean", "variance"], ["y"])
    model.graph.node.append(norm)
    for name in norm.input[1:]:
        value = np.abs(RNG.standard_normal(4)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    site, y = only_site(model, x), run(model, x)
    assert site.nodes == (0, 1)
    again = run(patched(model, site, dense_fragment(site.geometry, site.weight, site.bias_vector)), x)
    assert np.abs(again - y).max() <= 100 * EPS * np.abs(y).max()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"group": 5}, Why.UNSUPPORTED_OP),
        ({"output_shape": [17, 15], "strides": [2, 2]}, Why.UNSUPPORTED_OP),
        ({"output_padding": [1]}, Why.MALFORMED),
        ({"output_padding": [-1, 0]}, Why.MALFORMED),
        ({"output_shape": 17.0}, Why.MALFORMED),
    ],
)
def test_it_stays_for_a_reason(change: dict[str, Any], why: Why) -> None:
    model, _ = transposed(change)
    found = survey(Graph(model, Path()))
    assert (found.sites, [keep.why for keep in found.kept]) == ((), [why])


def batched(x_shape: tuple[int, ...], w_shape: tuple[int, ...], seed: int = 2) -> tuple[onnx.ModelProto, Array]:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(x_shape).cumsum(axis=-1) + 0.5).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mul")
    return model_of(node, x, {"w": rng.standard_normal(w_shape).astype(np.float32)}), x


BATCHES = {
    "one for all": ((3, 40, 6), (1, 6, 5)),
    "ones that make axes": ((40, 6), (1, 1, 6, 5)),
    "one each": ((3, 40, 6), (3, 6, 5)),
    "broadcast input": ((40, 6), (3, 6, 5)),
    "two axes": ((4, 2, 3, 40, 6), (2, 3, 6, 5)),
    "middle axis of one": ((2, 4, 40, 6), (2, 1, 6, 5)),
    "more axes than the input": ((3, 40, 6), (2, 3, 6, 5)),
}


@pytest.mark.parametrize(("x_shape", "w_shape"), BATCHES.values(), ids=BATCHES)
def test_a_batch_of_matrices_has_the_error_of_each_at_one_rank(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...]
) -> None:
    model, x = batched(x_shape, w_shape)
    site, y = only_site(model, x), run(model, x)
    geometry, kind = site.geometry, next(k for k in KINDS if k.name == "svd")
    count = int(np.prod(w_shape[:-2]))
    assert (geometry.groups, geometry.batch, geometry.outputs) == (count, w_shape[:-2], 5 * count)
    assert {k.name for k in KINDS if k.applies(geometry)} == {"svd"}
    dense = run(patched(model, site, dense_fragment(geometry, site.weight, site.bias_vector)), x)
    assert dense.shape == y.shape
    assert np.abs(dense - y).max() <= 100 * EPS * np.abs(y).max()
    fit, vectors = fit_of(site, x, y), rows(y, -1 if count == 1 else site.channel_axis)
    for rank in range(1, 6):
        left, right, bias = fitted(site, fit, rank)
        out = run(patched(model, site, kind.build(geometry, left, right, bias)), x)
        measured, theory = float(np.sum((out - y) ** 2)) / len(vectors), fit.factorization.error(rank)
        assert measured == pytest.approx(theory, rel=1e-3, abs=1e4 * EPS**2 * fit.factorization.total)
        whole = dense_fragment(geometry, grouped_product(left, right, geometry.groups), bias)
        assert run(patched(model, site, whole), x) == pytest.approx(out, abs=1e-3)
    assert fit.factorization.error(5) == pytest.approx(0, abs=1e-9 * fit.factorization.total)


@settings(max_examples=20)
@given(st.sampled_from(list(BATCHES.values())), st.integers(0, 2**32 - 1))
def test_more_rank_of_a_batch_is_never_worse(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    model, x = batched(*shapes, seed)
    site, y = only_site(model, x), run(model, x)
    kind, fit = next(k for k in KINDS if k.name == "svd"), fit_of(site, x, y)
    expected = [fit.relative(rank) for rank in range(1, 6)]
    parts = [fitted(site, fit, rank) for rank in range(1, 6)]
    outs = [run(patched(model, site, kind.build(site.geometry, *part)), x) for part in parts]
    errors = [float(np.sum((out - y) ** 2)) / float(np.sum(y.astype(np.float64) ** 2)) for out in outs]
    assert expected == sorted(expected, reverse=True)
    assert all(after <= before * (1 + 1e-4) + 1e4 * EPS**2 for before, after in itertools.pairwise(errors))
    assert errors[-1] <= 1e4 * EPS**2


def test_a_bias_behind_one_matrix_for_all_becomes_part_of_it() -> None:
    model, x = batched((3, 40, 6), (1, 6, 5))
    model.graph.node[0].output[0] = "t"
    model.graph.node.append(helper.make_node("Add", ["t", "b"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(5, np.float32), "b"))
    site = only_site(model, x)
    assert (site.nodes, site.centred) == ((0, 1), True)


@pytest.mark.parametrize(("shape", "left"), [((3, 6, 1), False), ((3, 1, 5), False), ((3, 5, 6), True)])
def test_a_batch_of_vectors_or_on_the_left_stays(shape: tuple[int, ...], left: bool) -> None:
    node = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"])
    x = np.ones((3, shape[-1], 2) if left else (3, 7, shape[1]), np.float32)
    found = survey(Graph(model_of(node, x, {"w": np.ones(shape, np.float32)}), Path()))
    assert [keep.why for keep in found.kept] == [Why.BATCHED]


@pytest.mark.parametrize(("precision", "rounding"), [(None, 1e-9), ("fp16", 1e-5), ("int8", 0.01)])
def test_both_go_all_the_way_from_the_file_to_a_rewritten_model(
    tmp_path: Path, precision: str | None, rounding: float
) -> None:
    """Calibrated, rewritten at full rank with no loss but rounding and at a lower one with some, in every precision."""
    rng = np.random.default_rng(3)
    arrays = {"w": rng.standard_normal((6, 4, 2, 2)), "v": rng.standard_normal((4, 10, 8))}
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["t"], name="up", strides=[2, 2]),
        helper.make_node("MatMul", ["t", "v"], ["y"], name="mul"),
    ]
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    samples = [{"x": rng.standard_normal((1, 6, 5, 5)).astype(np.float32)} for _ in range(24)]
    model = model_of(nodes[0], samples[0]["x"], weights, nodes[1])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    settings = Settings(cache=tmp_path / "cache", precision=precision, confidence=0.5)
    run_ = start(tmp_path / "m.onnx", samples, settings, Clock(lambda *_: None))
    assert [(s.name, s.geometry.groups) for s in run_.loaded.sites] == [("up", 1), ("mul", 4)]
    losses = []
    for full in (True, False):
        plan = (
            Decision("up", "ConvTranspose", (16, 6), "svd", 6 if full else 4),
            Decision("mul", "MatMul", (32, 10), "svd", 8 if full else 7),
        )
        losses.append(run_.loss_of(plan))
        assert groups(run_.loaded.sites, plan, 5) == []
    assert losses[0] < rounding < losses[1] < 0.6


def test_geometries_that_time_differently_have_keys_of_their_own() -> None:
    sites = [only_site(*transposed(case)) for case in (*DISJOINT.values(), *OVERLAPPING.values())]
    sites += [only_site(*batched(*shapes)) for shapes in BATCHES.values()]
    for a, b in itertools.combinations(sites, 2):
        assert a.geometry.key() != b.geometry.key()
