"""Grouped convolutions: a closed form for each group, one rank for all, as many groups on both nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.calibration import factorize, fitted
from onnx_lowrank.fragment import Kind
from onnx_lowrank.latency import fragment_model
from onnx_lowrank.linalg import factor_gram, grouped_product
from onnx_lowrank.moments import Moments, rows
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.conv_svd import CONV_SVD
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.plan import Decision
from onnx_lowrank.probe import Probes
from onnx_lowrank.refit import groups
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry, Site

GROUPS, ROWS = 3, 6
CONV = Geometry(
    "Conv", GROUPS * ROWS, 36, "float32", True, 17, channels=4, kernel=(3, 3), strides=(2, 1), dilations=(1, 1),
    pads=(1, 1, 1, 1), groups=GROUPS, x_shape=(2, 12, 15, 14),
)  # fmt: skip
POINTWISE = dataclasses.replace(CONV, inputs=8, channels=8, kernel=(1, 1), pads=(0,) * 4, x_shape=(2, 24, 15, 14))
LINE = dataclasses.replace(CONV, inputs=20, kernel=(5,), strides=(1,), dilations=(2,), pads=(4, 4), x_shape=(2, 12, 60))
cases = pytest.mark.parametrize(("kind", "geometry"), [(CONV_SVD, CONV), (SVD, POINTWISE), (CONV_SVD, LINE)])
EPS = float(np.finfo(np.float32).eps)


def example(geometry: Geometry) -> tuple[Site, npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """A site, its input, and its output as positions × N."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(geometry.x_shape).cumsum(axis=2) + 0.5).astype(np.float32)
    weight = rng.standard_normal((geometry.outputs, geometry.inputs)).astype(np.float32)
    site = Site("s", geometry, weight, rng.standard_normal(geometry.outputs), "x", "y", (0,))
    return site, x, ran(dense_fragment(geometry, weight.astype(np.float64), site.bias_vector), geometry, x)


def ran(fragment: Any, geometry: Geometry, x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return rows(np.asarray(Session(fragment_model(fragment, geometry)).run({"x": x})[0], np.float64), 1)


@cases
def test_the_error_is_the_sum_of_what_eckart_and_young_say_for_each_group(kind: Kind, geometry: Geometry) -> None:
    site, x, y = example(geometry)
    moments = Moments(geometry.outputs)
    moments.add(y)
    fit = factorize(site, moments)
    blocks = [factor_gram(np.cov(y[:, i : i + ROWS].T, bias=True)) for i in range(0, len(site.weight), ROWS)]
    last = np.inf
    for rank in range(1, kind.full(geometry) + 1):
        left, right, bias = fitted(site, fit, rank)
        assert (left.shape, right.shape) == kind.shapes(geometry, rank)
        out = ran(kind.build(geometry, left, right, bias), geometry, x)
        measured = float(np.sum((out - y) ** 2)) / len(y)
        expected = sum(block.error(rank) for block in blocks)
        total = fit.factorization.total
        assert measured == pytest.approx(expected, rel=1e-3, abs=1e4 * EPS**2 * total)
        assert fit.relative(rank) * total == pytest.approx(expected, rel=1e-4, abs=1e-9 * total)
        assert expected <= last
        last = expected
        whole = grouped_product(left, right, GROUPS)
        assert ran(dense_fragment(geometry, whole, bias), geometry, x) == pytest.approx(out, abs=1e-3)
    assert last == pytest.approx(0, abs=1e-9 * fit.factorization.total)


@cases
def test_both_nodes_have_the_groups_and_cost_what_is_said(kind: Kind, geometry: Geometry) -> None:
    rng, rank = np.random.default_rng(0), 2
    parts = [rng.standard_normal(shape) for shape in kind.shapes(geometry, rank)]
    fragment = kind.build(geometry, *parts, np.zeros(geometry.outputs))
    assert [op.attributes["group"] for op in fragment.ops] == [GROUPS, GROUPS]
    weights = sum(a.size for name, a in fragment.constants.items() if name.endswith("weight"))
    assert weights == kind.macs(geometry, rank)
    model = fragment_model(fragment, geometry)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [None] * len(geometry.x_shape)))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    assert 0 < kind.max_rank(geometry) < kind.full(geometry)
    assert geometry.key() != dataclasses.replace(geometry, groups=1).key()


def test_kinds_that_mix_groups_leave_them_alone() -> None:
    applying = {kind.name for kind in KINDS if kind.applies(CONV) or kind.applies(POINTWISE)}
    assert applying == {"svd", "conv_svd"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A grouped convolution with a ReLU between two plain ones, and a depthwise one."""
    folder = tmp_path_factory.mktemp("grouped")
    rng, nodes, tensors, name = np.random.default_rng(1), [], [], "x"
    for i, (channels, count) in enumerate([(12, 1), (4, 3), (12, 1), (1, 12)]):
        weight = rng.standard_normal((12, channels, 3, 3)) / np.sqrt(9 * channels)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(
            helper.make_node("Conv", [name, f"w{i}"], [f"c{i}"], name=f"conv{i}", group=count, pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        name = f"r{i}"
    x = helper.make_tensor_value_info("x", 1, [1, 12, 16, 16])
    y = helper.make_tensor_value_info(name, 1, [1, 12, 16, 16])
    graph = helper.make_graph(nodes, "grouped", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    data = [{"x": rng.standard_normal((1, 12, 16, 16)).astype(np.float32)} for _ in range(12)]
    return start(folder / "m.onnx", data, Settings(cache=folder / "cache"), Clock(lambda *_: None))


def test_a_grouped_site_is_found_probed_and_rewritten_and_has_no_metric(run: Run) -> None:
    sites = {site.name: site for site in run.loaded.sites}
    assert sorted(sites) == ["conv0", "conv1", "conv2"]
    assert (sites["conv1"].geometry.groups, sites["conv1"].tap) == (3, "output")
    assert "conv1" not in run.loaded.metrics
    assert run.fits["conv1"].narrow is None
    plan = tuple(
        Decision(name, "Conv", (12, site.geometry.inputs), *(("conv_svd", 3) if name == "conv1" else (None, None)))
        for name, site in sites.items()
    )
    assert groups(run.loaded.sites, plan, 5) == []  # not refitted
    built = run.build(plan)
    assert [node.attribute[0].i for node in built.graph.node if node.name.startswith("conv1/")] != []
    probes = Probes(run.loaded, [sites["conv1"]], run.fits, run.settings, 3)
    losses = [probes.loss("conv1", rank) for rank in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-9 < losses[2]
    assert run.loss_of(plan) == pytest.approx(losses[2], rel=0.3)  # on other samples
