"""The metric of an output is what its readers make of an error; the fit in it is best for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.calibration import factorize, fitted
from onnx_lowrank.consumers import readers
from onnx_lowrank.graph import Graph
from onnx_lowrank.importance import metric_of, output_metrics, slope
from onnx_lowrank.linalg import Metric
from onnx_lowrank.moments import Moments
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.sites import Site

RNG = np.random.default_rng(0)
HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '
TEXT = HEAD + "(float[n,8] x) => (float[n,6] z) {{ y = MatMul(x, u) {} z = MatMul({}, v) }}"


def chain(between: str, read: str) -> tuple[onnx.ModelProto, Graph, tuple[Site, ...]]:
    model = onnx.parser.parse_model(TEXT.format(between, read))
    for name, shape in (("u", (8, 12)), ("v", (12, 6))):
        model.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name))
    graph = Graph(model, Path())
    return model, graph, survey(graph).sites


def plain(gram: np.ndarray, ridge: float = 0.1) -> np.ndarray:
    """The matrix that a metric stands for: of mean diagonal one, with the ridge."""
    return np.asarray(gram / np.trace(gram) * len(gram) + ridge * np.eye(len(gram)))


@pytest.mark.parametrize("size", [1, 7, 20])
def test_root_and_inverse(size: int) -> None:
    factor = RNG.standard_normal((size, max(size - 3, 1)))
    found = Metric.of(factor @ factor.T, 0.1)
    assert found.root @ found.root == pytest.approx(plain(factor @ factor.T), abs=1e-9)
    assert found.root @ found.inverse == pytest.approx(np.eye(size), abs=1e-9)


def test_the_slope_of_a_line_and_of_a_bend() -> None:
    y = RNG.standard_normal((400, 5)).astype(np.float32)
    assert slope(y, 3 * y) == pytest.approx(np.full(y.shape, 3.0), rel=1e-3)
    bent = slope(y, np.maximum(y, 0))
    away = np.abs(y) > 0.05
    assert bent[away] == pytest.approx((y > 0)[away].astype(float), abs=1e-3)
    assert (slope(np.zeros((4, 2)), np.zeros((4, 2))) == 1).all()


def test_a_linear_reader_counts_what_it_reads() -> None:
    model, graph, sites = chain("", "y")
    found = readers(graph, sites[0], {s.nodes[0]: s for s in sites})
    metrics = output_metrics(model, Path(), [(sites[0], found)], [], bytes_of=lambda _: 1 << 29, provider="cpu", seed=0)
    reader = sites[1].weight.astype(np.float64)  # 6×12
    assert metrics[sites[0].name].root @ metrics[sites[0].name].root == pytest.approx(
        plain(reader.T @ reader), abs=1e-6
    )


def test_a_channel_that_the_activation_shuts_off_hardly_counts() -> None:
    model, graph, sites = chain("r = Relu(y)", "r")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[:, 3], weight[:, 5] = -np.abs(weight[:, 3]), np.abs(weight[:, 5])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "u"))
    samples = [{"x": np.abs(RNG.standard_normal((64, 8))).astype(np.float32)} for _ in range(4)]
    found = readers(graph, sites[0], {s.nodes[0]: s for s in sites})
    metric = output_metrics(
        model, Path(), [(sites[0], found)], samples, bytes_of=lambda _: 1 << 29, provider="cpu", seed=0
    )[sites[0].name]
    importance = np.diag(metric.root @ metric.root)
    assert importance[3] == pytest.approx(0.1, abs=1e-6)
    assert importance[5] > 0.2


def test_the_taps_of_a_kernel_add_up() -> None:
    model = onnx.parser.parse_model(HEAD + "(float[n,3,9,9] x) => (float[n,5,7,7] z) { z = Conv(x, s) }")
    kernel = RNG.standard_normal((5, 3, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(kernel, "s"))
    (site,) = survey(Graph(model, Path())).sites
    expected = np.einsum("nchw,ndhw->cd", kernel.astype(np.float64), kernel.astype(np.float64))
    found = metric_of([(site, 1.0)])
    assert found.root @ found.root == pytest.approx(plain(expected), abs=1e-6)


@pytest.mark.parametrize("rank", [2, 4])
def test_the_error_in_the_metric_is_the_predicted_one_and_the_reader_gains(rank: int) -> None:
    _, _, sites = chain("", "y")
    site = sites[0].seen(((400, 8),))
    x = (RNG.standard_normal((400, 8)) * np.arange(1, 9)).astype(np.float64)
    moments = Moments(8)
    moments.add(x)
    metric = metric_of([(sites[1], 1.0)])
    weight, reader = site.weight.astype(np.float64), sites[1].weight.astype(np.float64)
    fit = factorize(site, moments, metric)
    left, right, _ = fitted(site, fit, rank)
    lost = x @ (weight - left @ right).T
    measured = np.sum((lost @ metric.root) ** 2) / np.sum((x @ weight.T @ metric.root) ** 2)
    assert measured == pytest.approx(fit.relative(rank), rel=1e-6)
    without = fitted(site, dataclasses.replace(factorize(site, moments)), rank)
    lost_without = x @ (weight - without[0] @ without[1]).T
    assert np.sum((lost @ reader.T) ** 2) < np.sum((lost_without @ reader.T) ** 2)
