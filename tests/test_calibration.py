"""Moments out of real runs equal those computed directly; factors at full rank are the weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.calibration import collect, factorize, fitted
from onnx_lowrank.errors import DataError, SettingsError
from onnx_lowrank.files import ModelFile
from onnx_lowrank.graph import Graph
from onnx_lowrank.moments import Moments
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.rewrite import check_matches, rewritten
from onnx_lowrank.runtime import Session
from onnx_lowrank.sites import Site

HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '
RNG = np.random.default_rng(0)
MODELS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    # name: graph, shape of w, shape of a sample
    "matmul, wide": ("(float[n,4] x) => (float[n,9] y) <float[1] c = {0}> { y = MatMul(x, w) }", (4, 9), (50, 4)),
    "matmul, thin": ("(float[n,9] x) => (float[n,4] y) <float[1] c = {0}> { y = MatMul(x, w) }", (9, 4), (50, 9)),
    "on the left": ("(float[5,n] x) => (float[3,n] y) <float[1] c = {0}> { y = MatMul(w, x) }", (3, 5), (5, 60)),
    "gemm transA": (
        "(float[4,n] x) => (float[n,9] y) <float[9] b = {1,2,3,4,5,6,7,8,9}> { y = Gemm <transA = 1> (x, w, b) }",
        (4, 9),
        (4, 50),
    ),
    "conv": (
        "(float[n,3,8,8] x) => (float[n,5,m,k] y) <float[5] b = {1,2,3,4,5}>"
        "{ y = Conv <pads = [1,1,1,1], strides = [2,1]> (x, w, b) }",
        (5, 3, 3, 3),
        (2, 3, 8, 8),
    ),
    "conv 1×1": (
        "(float[n,3,8,8] x) => (float[n,7,m,k] y) <float[7] b = {1,2,3,4,5,6,7}> { y = Conv(x, w, b) }",
        (7, 3, 1, 1),
        (2, 3, 8, 8),
    ),
}
each = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[onnx.ModelProto, Site, list[dict[str, npt.NDArray[Any]]]]:
    text, weight, shape = MODELS[name]
    model = onnx.parser.parse_model(HEAD + text)
    model.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal(weight).astype(np.float32), "w"))
    (site,) = survey(Graph(model, Path())).sites
    samples = [{"x": (RNG.standard_normal(shape) + 1).astype(np.float32)} for _ in range(3)]
    return model, site.seen((shape,)), samples


def moments_of(model: onnx.ModelProto, site: Site, samples: list[dict[str, npt.NDArray[Any]]]) -> Moments:
    found = collect(
        model, Path(), [site], samples, bytes_of=lambda _: 1, provider="cpu", progress=lambda *_: None
    )  # fmt: skip
    return found[site.taps]


@each
def test_moments_are_those_of_the_tapped_tensor(name: str) -> None:
    model, site, samples = made(name)
    found = moments_of(model, site, samples)
    tensors = [s["x"] if site.tap == "input" else Session(model).run(s)[0] for s in samples]
    vectors = np.concatenate([np.moveaxis(t, site.channel_axis, -1).reshape(-1, found.mean.size) for t in tensors])
    assert found.count == len(vectors)
    assert found.second == pytest.approx(vectors.T.astype(np.float64) @ vectors / len(vectors), rel=1e-5)


@each
def test_full_rank_is_the_weight_and_the_bias(name: str) -> None:
    model, site, samples = made(name)
    fit = factorize(site, moments_of(model, site, samples))
    left, right, bias = fitted(site, fit, min(site.geometry.outputs, site.geometry.inputs))
    assert left @ right == pytest.approx(site.weight.astype(np.float64), abs=1e-5)
    assert bias == pytest.approx(site.bias_vector, abs=1e-4)
    assert fit.relative(min(left.shape)) == pytest.approx(0.0, abs=1e-9)


@each
def test_the_error_on_the_samples_is_the_predicted_one(name: str) -> None:
    model, site, samples = made(name)
    moments = moments_of(model, site, samples)
    fit = factorize(site, counted_as_many(moments))
    left, right, bias = fitted(site, fit, 2)
    graph_file = ModelFile(Path("m.onnx"), model, "", 0, False)
    kind = "conv_svd" if name == "conv" else "svd"
    decision = Decision(site.name, site.geometry.op, (site.geometry.outputs, site.geometry.inputs), kind, 2)
    changed = Session(rewritten(graph_file, [site], {site.name: fit}, [decision]))
    error = sum(np.sum((np.float64(changed.run(s)[0]) - Session(model).run(s)[0]) ** 2) for s in samples)
    positions = sum(Session(model).run(s)[0].size for s in samples) / site.geometry.outputs
    assert error / positions == pytest.approx(fit.factorization.error(2), rel=1e-3)
    assert (left.shape[1], right.shape[0], len(bias)) == (2, 2, site.geometry.outputs)


def counted_as_many(moments: Moments) -> Moments:
    """The same moments, counted as many: no shrinkage, so that the prediction is exact on these samples."""
    scale = 10**6
    many = Moments(len(moments.mean))
    many._count = moments.count * scale
    many._sum, many._products = moments._sum * scale, moments._products * scale
    return many


def test_few_positions_are_shrunk_towards_white_inputs() -> None:
    model, site, samples = made("matmul, thin")
    few = Moments(site.geometry.inputs if site.tap == "input" else site.geometry.outputs)
    few.add(RNG.standard_normal((2, len(few.mean))))
    fit = factorize(site, few)
    assert (fit.factorization.values > 0).all()  # two positions alone would leave most directions empty
    assert fit.factorization.total == pytest.approx(np.trace(few.second), rel=1e-9)
    assert len(samples) == 3
    assert model.graph.node


def test_an_activation_that_is_not_finite_names_its_tensor() -> None:
    model, site, samples = made("matmul, wide")
    samples[1]["x"][0, 0] = np.inf
    with pytest.raises(DataError, match=f"tensor '{site.tensor}'"):
        moments_of(model, site, samples)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"node": "z"}, "no site"),
        ({"shape": (9, 5)}, "9×5 in the plan"),
        ({"op": "Gemm"}, "Gemm"),
        ({"kind": "monarch"}, "cannot become monarch"),
        ({"kind": "conv_svd"}, "cannot become conv_svd at rank 2"),
        ({"rank": 4}, "at rank 4"),
    ],
)
def test_a_plan_for_another_graph_is_refused(change: dict[str, Any], says: str) -> None:
    _, site, _ = made("matmul, wide")
    decision = Decision(site.name, "MatMul", (9, 4), "svd", 2)
    check_matches([decision], [site])
    with pytest.raises(SettingsError, match=says):
        check_matches([dataclasses.replace(decision, **change)], [site])


def test_rewriting_leaves_the_original_as_it_was() -> None:
    model, site, samples = made("conv")
    before = model.SerializeToString(deterministic=True)
    fit = factorize(site, moments_of(model, site, samples))
    decision = Decision(site.name, "Conv", (5, 27), "conv_svd", 2)
    assert (
        len(rewritten(ModelFile(Path("m.onnx"), model, "", 0, False), [site], {site.name: fit}, [decision]).graph.node)
        == 2
    )
    assert model.SerializeToString(deterministic=True) == before
