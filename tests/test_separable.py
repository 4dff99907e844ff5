"""Patches and separable kernels, with the runtime's own convolution and exact least squares as oracles."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_lowrank.calibration import Fit, factors
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.fragment import Kind, Split, size_text, split_width
from onnx_lowrank.latency import fragment_model
from onnx_lowrank.linalg import Factorization
from onnx_lowrank.passes.asym3d import ASYM3D
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.spatial import SPATIAL
from onnx_lowrank.passes.tucker import TUCKER
from onnx_lowrank.patches import padding, sampled
from onnx_lowrank.plan import Decision
from onnx_lowrank.regression import JointMoments
from onnx_lowrank.rewrite import check_matches
from onnx_lowrank.runtime import Session
from onnx_lowrank.separable import Separable, separable
from onnx_lowrank.sites import Geometry, Site

PLAIN = Geometry(
    "Conv", 12, 45, "float64", True, 17, channels=5, kernel=(3, 3), strides=(1, 1), dilations=(1, 1),
    pads=(1, 1, 1, 1), x_shape=(2, 5, 9, 8),
)  # fmt: skip
GEOMETRIES = {
    "plain": PLAIN,
    "strided": dataclasses.replace(PLAIN, strides=(2, 3)),
    "dilated": dataclasses.replace(PLAIN, dilations=(2, 1), pads=(2, 0, 1, 1)),
    "tall": dataclasses.replace(PLAIN, kernel=(5, 2), inputs=50, pads=(2, 0, 2, 1)),
    "same upper": dataclasses.replace(PLAIN, strides=(2, 2), auto_pad="SAME_UPPER", pads=(0, 0, 0, 0)),
    "same lower": dataclasses.replace(PLAIN, kernel=(2, 4), inputs=40, auto_pad="SAME_LOWER", pads=(0, 0, 0, 0)),
    "valid": dataclasses.replace(PLAIN, auto_pad="VALID", pads=(0, 0, 0, 0)),
}
OTHER_AXES = {
    "line": dataclasses.replace(
        PLAIN, inputs=25, kernel=(5,), strides=(2,), dilations=(1,), pads=(1, 2), x_shape=(3, 5, 41)
    ),
    "volume": dataclasses.replace(
        PLAIN, inputs=40, kernel=(2, 1, 4), strides=(1, 1, 2), dilations=(2, 1, 1), pads=(1, 0, 2, 0, 0, 1),
        x_shape=(2, 5, 5, 3, 9),
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
EPS = float(np.finfo(np.float32).eps)


def in_float32(geometry: Geometry) -> Geometry:
    """The CPU provider has no float64 convolution."""
    return dataclasses.replace(geometry, dtype="float32")


def data(geometry: Geometry, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Correlated input, weight N×K and bias."""
    rng = np.random.default_rng(seed)
    ones = (1,) * len(geometry.kernel)
    x = rng.standard_normal(geometry.x_shape).cumsum(axis=2) + rng.standard_normal((1, geometry.channels, *ones))
    return x, rng.standard_normal((geometry.outputs, geometry.inputs)), rng.standard_normal(geometry.outputs)


def convolved(geometry: Geometry, x: npt.NDArray[Any], weight: npt.NDArray[Any], bias: npt.NDArray[Any]) -> Any:
    single = in_float32(geometry)
    model = fragment_model(dense_fragment(single, weight, bias), single)
    return np.asarray(Session(model).run({"x": x.astype(np.float32)})[0], np.float64)


def fit(
    geometry: Geometry, x: npt.NDArray[Any], weight: npt.NDArray[Any], ranks: int = 99, split: Split = "columns"
) -> Separable:
    moments = JointMoments(geometry.inputs)
    moments.add(sampled(x, geometry, 10**9, np.random.default_rng(0)))
    width = split_width(geometry, split)
    return separable(weight, moments.covariance, moments.mean, width, moments.count, ranks)


@pytest.mark.parametrize("geometry", (GEOMETRIES | OTHER_AXES).values(), ids=GEOMETRIES | OTHER_AXES)
def test_all_patches_times_the_weight_are_the_convolution(geometry: Geometry) -> None:
    x, weight, bias = data(geometry)
    y = convolved(geometry, x, weight, bias)
    found = sampled(x, geometry, 10**9, np.random.default_rng(0)) @ weight.T + bias
    expected = np.moveaxis(y, 1, -1).reshape(-1, geometry.outputs)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 100 * EPS * np.abs(expected).max()


def test_a_sample_of_patches_is_some_of_all() -> None:
    x, _, _ = data(PLAIN)
    every = {row.tobytes() for row in sampled(x, PLAIN, 10**9, np.random.default_rng(0))}
    some = sampled(x, PLAIN, 20, np.random.default_rng(1))
    assert len(some) == 20
    assert {row.tobytes() for row in some} <= every


def test_same_padding_is_larger_at_the_named_end() -> None:
    upper, lower = GEOMETRIES["same upper"], GEOMETRIES["same lower"]
    assert padding(upper, (9, 8)) == ((1, 1), (0, 1))
    assert padding(lower, (9, 8)) == ((1, 0), (2, 1))


def test_moments_are_numpys() -> None:
    x = np.random.default_rng(0).standard_normal((3000, 7)) + 2
    moments = JointMoments(7)
    moments.add(x[:100])
    moments.add(x[100:])
    assert moments.count == 3000
    assert moments.mean == pytest.approx(x.mean(axis=0))
    assert moments.covariance == pytest.approx(np.cov(x.T, bias=True))


def test_an_activation_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        JointMoments(2).add(np.array([[1.0, np.inf]]))


@cases
def test_the_error_at_every_rank_is_the_one_on_the_data(geometry: Geometry) -> None:
    x, weight, bias = data(geometry)
    patches = sampled(x, geometry, 10**9, np.random.default_rng(0))
    found = fit(geometry, x, weight)
    centred = patches - patches.mean(axis=0)
    power = np.sum((centred @ weight.T) ** 2)
    width = geometry.kernel[1]
    last = 1.0
    for rank in range(1, found.largest + 1):
        first, second, mean = found.factors(rank)
        columns = patches.reshape(len(patches), -1, width)
        thin = np.einsum("rc,pcj->prj", first, columns).reshape(len(patches), -1)
        error = np.sum((patches @ weight.T - weight @ patches.mean(axis=0) - thin @ second.T + mean) ** 2)
        used = rank * width
        raw = found.relative(rank) * (len(patches) - used) / len(patches) if used < len(patches) else 0.0
        assert raw == pytest.approx(error / power, abs=1e-6)
        assert raw <= last + 1e-9  # never worse with more rank
        last = raw
    assert bias.shape == (geometry.outputs,)


@cases
def test_full_rank_is_the_convolution_itself(geometry: Geometry) -> None:
    x, weight, bias = data(geometry)
    found = fit(geometry, x, weight)
    single = in_float32(geometry)
    rank = SPATIAL.full(geometry)
    first, second, mean = found.factors(rank)
    patches = sampled(x, geometry, 10**9, np.random.default_rng(0))
    corrected = bias + weight @ patches.mean(axis=0) - mean
    model = fragment_model(SPATIAL.build(single, first, second, corrected), single)
    y = convolved(geometry, x, weight, bias)
    out = np.asarray(Session(model).run({"x": x.astype(np.float32)})[0])
    # Two float32 convolutions, and the ridge of the fit: its square root bounds the relative error of the output.
    assert np.abs(out - y).max() <= (1e-3 + 1000 * EPS) * np.abs(y).max()


two_ranks = pytest.mark.parametrize("kind", [ASYM3D, TUCKER], ids=lambda kind: kind.name)


def site_of(geometry: Geometry, x: npt.NDArray[Any], kind: Kind) -> tuple[Site, Fit]:
    """A site of seed 0 with its nested fit on all patches."""
    _, weight, bias = data(geometry)
    assert kind.split is not None
    nested = {kind.split: fit(geometry, x, weight, split=kind.split)}
    linear = weight @ sampled(x, geometry, 10**9, np.random.default_rng(0)).mean(axis=0)
    spectrum = Factorization(np.eye(len(weight)), np.zeros(len(weight)), 0.0)
    return Site("s", geometry, weight, bias, "x", "y", (0,)), Fit(spectrum, linear + bias, linear, nested=nested)


PAIRS = [(kind, g) for kind in (ASYM3D, TUCKER) for g in (GEOMETRIES | OTHER_AXES).values() if kind.applies(g)]


@pytest.mark.parametrize(("kind", "geometry"), PAIRS)
def test_the_error_at_every_pair_of_ranks_is_the_one_on_the_data(kind: Kind, geometry: Geometry) -> None:
    """Of the fragment that is built, run over all positions; corrected for the coefficients fitted to them."""
    x, weight, bias = data(geometry)
    site, found = site_of(geometry, x, kind)
    nested, single = found.nested[kind.split or "columns"], in_float32(geometry)
    y = convolved(geometry, x, weight, bias)
    centred = np.moveaxis(y, 1, -1).reshape(-1, geometry.outputs)
    power = np.sum((centred - centred.mean(axis=0)) ** 2)
    for inner, rank in itertools.product((1, 3, nested.largest), (2, 7, geometry.outputs)):
        *parts, corrected = factors(site, found, kind, rank, inner)
        assert [part.shape for part in parts] == list(kind.shapes(geometry, rank, inner))
        model = fragment_model(kind.build(single, *parts, corrected), single)
        out = np.asarray(Session(model).run({"x": x.astype(np.float32)})[0], np.float64)
        free = nested.count - inner * split_width(geometry, kind.split or "columns")
        expected = found.relative(rank, inner, split=kind.split)
        measured = np.sum((out - y) ** 2) / power * nested.count / free if free > 0 else 1.0
        assert min(measured, 1.0) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("kind", "geometry"), PAIRS)
def test_both_ranks_full_are_the_convolution_itself(kind: Kind, geometry: Geometry) -> None:
    x, weight, bias = data(geometry)
    site, found = site_of(geometry, x, kind)
    assert kind.inner_full is not None
    parts = factors(site, found, kind, kind.full(geometry), kind.inner_full(geometry))
    single = in_float32(geometry)
    out = Session(fragment_model(kind.build(single, *parts), single)).run({"x": x.astype(np.float32)})[0]
    y = convolved(geometry, x, weight, bias)
    # As above: the square root of the ridge bounds the relative error, and rounding comes with it.
    assert np.abs(out - y).max() <= (1e-3 + 1000 * EPS) * np.abs(y).max()


@two_ranks
@cases
def test_the_error_never_rises_with_either_rank(kind: Kind, geometry: Geometry) -> None:
    x, weight, _ = data(dataclasses.replace(geometry, x_shape=(8, 5, 19, 18)))
    assert kind.split is not None
    nested = fit(geometry, x, weight, split=kind.split)
    errors = nested.errors(range(1, nested.largest + 1), range(1, geometry.outputs + 1))
    width = split_width(geometry, kind.split)
    raw = errors * (1 - width * np.arange(1, nested.largest + 1)[:, None] / nested.count)
    assert (np.diff(raw, axis=0) <= 1e-9).all()
    assert (np.diff(raw, axis=1) <= 1e-9).all()
    assert raw[-1, -1] == pytest.approx(0, abs=1e-5)


@two_ranks
def test_a_weight_of_two_small_ranks_is_found_there(kind: Kind) -> None:
    rng = np.random.default_rng(3)
    x, _, _ = data(PLAIN)
    assert kind.split is not None
    width = split_width(PLAIN, kind.split)
    first, core, last = (rng.standard_normal(shape) for shape in kind.shapes(PLAIN, 4, 2))
    weight = last @ np.einsum("rsj,sc->rcj", core.reshape(4, 2, width), first).reshape(4, 45)
    nested = fit(PLAIN, x, weight, split=kind.split)
    (exact, outer, inner) = (nested.errors([a], [b])[0, 0] for a, b in ((2, 4), (2, 3), (1, 4)))
    assert exact < 1e-6
    assert min(outer, inner) > 1e-3


@two_ranks
def test_sizes_that_save_no_work_are_refused(kind: Kind) -> None:
    allowed = [(s, r) for s in range(-1, 60) for r in range(-1, 15) if kind.allows(PLAIN, r, s)]
    assert allowed
    assert max(s for s, _ in allowed) <= (15 if kind is ASYM3D else 5)
    assert all(0 < r < 12 and s > 0 and kind.cost(PLAIN, r, s) < 12 * 45 for s, r in allowed)
    assert not kind.allows(PLAIN, 3)  # one rank is missing
    assert not SPATIAL.allows(PLAIN, 3, 3)  # one is too many
    for geometry in (
        Geometry("MatMul", 8, 8, "float32", True, 17),
        dataclasses.replace(PLAIN, kernel=(1, 1), inputs=5),
    ):
        assert not kind.applies(geometry)
        assert not kind.allows(geometry, 1, 1)


def test_a_site_without_patches_has_no_nested_fit() -> None:
    x, _, _ = data(PLAIN)
    site, found = site_of(PLAIN, x, TUCKER)
    assert found.relative(2, split="columns") == 1.0
    assert not found.serves(SPATIAL, PLAIN, 2)
    with pytest.raises(ValueError, match="no nested fit of its columns"):
        factors(site, found, SPATIAL, 2)


def test_a_separable_kernel_is_found_at_its_rank() -> None:
    rng = np.random.default_rng(3)
    x, _, _ = data(PLAIN)
    vertical, horizontal = rng.standard_normal((2, 15)), rng.standard_normal((12, 2, 3))
    weight = np.einsum("rc,nrj->ncj", vertical, horizontal).reshape(12, 45)
    found = fit(PLAIN, x, weight)
    assert found.relative(2) < 1e-6
    assert found.relative(1) > 1e-3


def test_few_patches_are_not_trusted() -> None:
    x, weight, _ = data(dataclasses.replace(PLAIN, x_shape=(1, 5, 4, 4)))
    found = fit(PLAIN, x, weight)
    assert found.count == 16
    assert found.relative(6) == 1.0  # 18 coefficients an output, 16 patches


def test_a_site_without_output_has_no_error() -> None:
    x, weight, _ = data(PLAIN)
    assert fit(PLAIN, x, weight * 0).relative(1) == 0.0


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("MatMul", 8, 8, "float32", True, 17),
        dataclasses.replace(PLAIN, kernel=(1, 1), inputs=5),
        dataclasses.replace(PLAIN, kernel=(3, 1), inputs=15),
        dataclasses.replace(PLAIN, kernel=(1, 3), inputs=15),
        dataclasses.replace(PLAIN, kernel=(3,), inputs=15),
        dataclasses.replace(PLAIN, kernel=(3, 3, 3), inputs=135),
        dataclasses.replace(PLAIN, groups=2),
    ],
    ids=["MatMul", "1×1", "3×1", "1×3", "line", "volume", "grouped"],
)
@pytest.mark.parametrize("kind", [SPATIAL, ASYM3D], ids=lambda kind: kind.name)
def test_what_has_no_two_axes_is_left_alone(kind: Kind, geometry: Geometry) -> None:
    """And a plan that asks for it is refused in one line."""
    inner = 0 if kind is SPATIAL else 1
    assert kind.allows(PLAIN, 1, inner)
    assert not kind.applies(geometry)
    assert not kind.allows(geometry, 1, inner)
    shape = (geometry.outputs, geometry.inputs)
    site = Site("s", geometry, np.zeros(shape), np.zeros(geometry.outputs), "x", "y", (0,))
    with pytest.raises(SettingsError, match=f"^node 's' cannot become {kind.name} at rank {size_text(1, inner)}$"):
        check_matches([Decision("s", geometry.op, shape, kind.name, 1, inner=inner)], [site])


def test_the_largest_rank_costs_less_than_dense() -> None:
    rank = SPATIAL.max_rank(PLAIN)
    assert SPATIAL.cost(PLAIN, rank) < 12 * 45 <= SPATIAL.cost(PLAIN, rank + 1)


@pytest.mark.parametrize("split", ["columns", "channels"])
def test_what_is_fitted_at_a_rank_does_not_depend_on_the_largest_one(split: Split) -> None:
    x, weight, _ = data(PLAIN)
    few, many = (fit(PLAIN, x, weight, ranks, split) for ranks in (2, 4))
    assert few.relative(2) == pytest.approx(many.relative(2), rel=1e-9)
    for one, other in zip(few.factors(2), many.factors(2), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10 * np.abs(other).max())
