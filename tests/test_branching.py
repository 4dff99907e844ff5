"""Block-diagonal cores: errors against the runtime, sums of terms found again, closer than the blocks of a core."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_lowrank.branching import branched, spread
from onnx_lowrank.calibration import Fit, factors
from onnx_lowrank.fragments import fragment_model
from onnx_lowrank.ladders import of_terms
from onnx_lowrank.linalg import Factorization
from onnx_lowrank.passes.branch import BRANCH2, BRANCH4, BRANCH8, branch
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.tucker import TUCKER
from onnx_lowrank.patches import sampled
from onnx_lowrank.regression import JointMoments
from onnx_lowrank.runtime import Session
from onnx_lowrank.separable import Separable, separable
from onnx_lowrank.sites import Geometry, Site

CONV = Geometry(
    "Conv", 24, 144, "float32", True, 17, channels=16, kernel=(3, 3), strides=(1, 1), dilations=(1, 1),
    pads=(1, 1, 1, 1), x_shape=(2, 16, 23, 21),
)  # fmt: skip
GEOMETRIES = {
    "plain": CONV,
    "strided, dilated": dataclasses.replace(CONV, strides=(2, 1), dilations=(1, 2), pads=(0, 1, 1, 2)),
    "of a line": dataclasses.replace(
        CONV, inputs=80, kernel=(5,), strides=(2,), dilations=(1,), pads=(1, 2), x_shape=(3, 16, 401)
    ),
}
SIZES = [(BRANCH2, 8, 4), (BRANCH2, 10, 8), (BRANCH4, 16, 8), (BRANCH8, 8, 8)]
Floats = npt.NDArray[np.float64]


def given(geometry: Geometry, seed: int = 0) -> tuple[Floats, Floats]:
    """Correlated inputs and a weight N×K whose filters are alike."""
    rng = np.random.default_rng(seed)
    x = np.einsum(
        "dc,bc...->bd...", rng.standard_normal((16, 16)), rng.standard_normal(geometry.x_shape).cumsum(axis=2)
    )
    weight = rng.standard_normal((24, 24)) * 0.8 ** np.arange(24) @ rng.standard_normal((24, geometry.inputs))
    return x.astype(np.float32).astype(np.float64), weight


def fitted(geometry: Geometry, x: Floats, weight: Floats, ranks: int = 8) -> tuple[Separable, Floats]:
    """The nested fit of the channels on all patches, and these."""
    patches = sampled(x, geometry, 10**9, np.random.default_rng(0))
    moments = JointMoments(geometry.inputs)
    moments.add(patches)
    width = geometry.inputs // geometry.channels
    return separable(weight, moments.covariance, moments.mean, width, moments.count, ranks), patches


def site_of(geometry: Geometry, x: Floats, weight: Floats) -> tuple[Site, Fit]:
    nested, patches = fitted(geometry, x, weight)
    linear, bias = weight @ patches.mean(axis=0), np.arange(24.0)
    spectrum = Factorization(np.eye(24), np.zeros(24), 0.0)
    site = Site("s", geometry, weight, bias, "x", "y", (0,))
    return site, Fit(spectrum, linear + bias, linear, nested={"channels": nested})


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("kind", "rank", "inner"), SIZES)
def test_the_error_is_the_one_of_the_fragment_on_the_data(kind, rank, inner, geometry) -> None:  # type: ignore[no-untyped-def]
    x, weight = given(geometry)
    site, fit = site_of(geometry, x, weight)
    assert fit.serves(kind, geometry, rank, inner)
    *parts, bias = factors(site, fit, kind, rank, inner)
    assert [part.shape for part in parts] == list(kind.shapes(geometry, rank, inner))
    fragments = kind.build(geometry, *parts, bias), dense_fragment(geometry, weight, site.bias_vector)
    out, y = (
        np.asarray(Session(fragment_model(f, geometry)).run({"x": x.astype(np.float32)})[0], np.float64)
        for f in fragments
    )
    centred = np.moveaxis(y, 1, -1).reshape(-1, 24)
    count = len(centred)
    measured = np.sum((out - y) ** 2) / np.sum((centred - centred.mean(axis=0)) ** 2)
    free = count - inner * geometry.inputs // geometry.channels
    assert fit.of(kind, geometry, rank, inner) == pytest.approx(measured * count / free, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_sum_of_terms_is_found_whatever_the_order_and_the_mixing_of_channels(groups: int) -> None:
    """The core of the weight is block-diagonal behind a mixing of eight channels that the fit is not told."""
    rng = np.random.default_rng(1)
    x, _ = given(CONV)
    core = spread(rng.standard_normal((8, 8 // groups * 9)), groups)
    mixing = rng.standard_normal((8, 16))
    last = rng.standard_normal((24, 8)) * np.repeat(4.0 ** -np.arange(groups), 8 // groups)
    weight = last @ np.einsum("rsj,sc->rcj", core.reshape(8, 8, 9), mixing).reshape(8, 144)
    nested, _ = fitted(CONV, x, weight)
    plain = blocks_of_tucker(nested, 8, 8, groups)
    found = branched(nested, 8, 8, groups, 8).relative
    assert found < 0.01
    assert found < plain / 10


@pytest.mark.parametrize("groups", [2, 4])
def test_a_sum_of_terms_that_see_uncorrelated_channels_is_exact(groups: int) -> None:
    """Where terms neither read nor write in common, the first ones' power is the largest, and the HOSVD finds each.

    What is common is judged in the metric of the data: the channels are correlated, and the terms read directions that
    are white in it.
    """
    rng = np.random.default_rng(1)
    rotation, powers = np.linalg.qr(rng.standard_normal((16, 16)))[0], np.geomspace(4, 0.05, 16)
    covariance = np.kron(rotation * powers @ rotation.T, np.eye(9))
    unwhitened = rotation / np.sqrt(powers) @ rotation.T
    mixing = np.linalg.qr(rng.standard_normal((16, 8)))[0].T @ unwhitened
    core = spread(rng.standard_normal((8, 8 // groups * 9)), groups)
    last = np.linalg.qr(rng.standard_normal((24, 8)))[0] * np.repeat(4.0 ** -np.arange(groups), 8 // groups)
    weight = last @ np.einsum("rsj,sc->rcj", core.reshape(8, 8, 9), mixing).reshape(8, 144)
    nested = separable(weight, covariance, np.zeros(144), 9, 10**6, 8)
    found = branched(nested, 8, 8, groups, 8)
    assert found.relative < 3e-7  # the ridge of the nested fit, and single precision
    made = (found.last @ spread(found.core, groups)).reshape(24, 8, 9)
    made = np.einsum("nsj,sc->ncj", made, found.first).reshape(24, 144)
    assert np.abs(made - weight).max() < 1e-3 * np.abs(weight).max()


def blocks_of_tucker(nested: Separable, rank: int, inner: int, groups: int) -> float:
    """The relative error when only the diagonal blocks of tucker's core are kept, as in the paper; corrected alike."""
    width = nested.mean.shape[1]
    last = nested.spectrum(inner).basis[:, :rank]
    core = last.T @ nested.factors(inner)[1]
    mask = spread(np.ones((rank, inner // groups * width)), groups)
    lower, seen = nested.lower[: inner * width, : inner * width], nested.coordinates[: inner * width]
    read = (last @ (core * mask)) @ lower
    return nested.corrected(float(np.sum(seen**2) - np.sum((seen.T - read) ** 2)), inner)


@pytest.mark.parametrize(("kind", "rank", "inner"), SIZES)
def test_it_lies_between_tucker_and_the_blocks_of_its_core(kind, rank, inner) -> None:  # type: ignore[no-untyped-def]
    x, weight = given(CONV)
    nested, _ = fitted(CONV, x, weight)
    found = branched(nested, rank, inner, kind.terms, kind.filters(CONV, rank, inner)).relative
    assert found < 0.8 * blocks_of_tucker(nested, rank, inner, kind.terms)
    if kind.filters(CONV, rank, inner) == inner:  # within the same filters, nothing is closer than the full core
        assert found >= nested.errors([inner], [rank])[0, 0] - 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("groups", "ranks", "inners"), [(2, (2, 4, 8, 12, 16), (2, 4, 6, 8)), (4, (4, 8, 16), (4, 8))])
def test_more_of_either_rank_alone_is_closer(groups: int, ranks: Any, inners: Any, seed: int) -> None:
    """But for a little: alternating ends where it started best, not always at the best of all."""
    x, weight = given(CONV, seed)
    nested, _ = fitted(CONV, x, weight)
    for inner in inners[:2]:
        errors = [branched(nested, rank, inner, groups, 8).relative for rank in ranks]
        assert all(after <= 1.02 * before for before, after in itertools.pairwise(errors))
        assert errors[-1] < 0.9 * errors[0]
    errors = [branched(nested, 8, inner, groups, 8).relative for inner in inners]
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_more_channels_between_are_closer() -> None:
    x, weight = given(CONV)
    nested, _ = fitted(CONV, x, weight)
    errors = [branched(nested, size, size, 2, 8).relative for size in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_a_fit_is_made_once() -> None:
    x, weight = given(CONV)
    nested, _ = fitted(CONV, x, weight)
    assert branched(nested, 8, 4, 2, 8) is branched(nested, 8, 4, 2, 8)
    assert branched(nested, 8, 4, 2, 8) is not branched(fitted(CONV, x, weight)[0], 8, 4, 2, 8)


def test_a_core_of_blocks_is_zero_outside_of_them() -> None:
    core = np.arange(1.0, 13).reshape(4, 3)
    assert spread(core, 2).tolist() == [
        [1, 2, 3, 0, 0, 0],
        [4, 5, 6, 0, 0, 0],
        [0, 0, 0, 7, 8, 9],
        [0, 0, 0, 10, 11, 12],
    ]
    assert np.array_equal(spread(core, 1), core)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("MatMul", 24, 16, "float32", True, 17, x_shape=(9, 16)),
        dataclasses.replace(CONV, kernel=(1, 1), inputs=16),
        dataclasses.replace(CONV, groups=2, channels=8, inputs=72),
        dataclasses.replace(CONV, channels=512, inputs=4608),
        dataclasses.replace(CONV, outputs=1),
        dataclasses.replace(CONV, channels=3, inputs=27),
    ],
    ids=["no convolution", "1×1", "grouped", "too wide a patch", "one output", "too few channels"],
)
def test_what_it_leaves_alone(geometry: Geometry) -> None:
    assert BRANCH2.applies(CONV)
    assert not BRANCH2.applies(geometry)
    assert not BRANCH2.allows(geometry, 2, 2)


def test_sizes_that_are_no_whole_groups_or_save_nothing_are_refused() -> None:
    kind = branch(4)
    assert kind.allows(CONV, 8, 4)
    assert not kind.allows(CONV, 6, 4)
    assert not kind.allows(CONV, 8, 6)
    assert not kind.allows(CONV, 8, 12)  # above half of the channels
    assert not kind.allows(CONV, 8)
    assert kind.macs(CONV, 8, 4) == 16 * 4 + 9 * 4 * 8 // 4 + 8 * 24
    assert kind.macs(CONV, 8, 4) < TUCKER.macs(CONV, 8, 4)


def test_a_fit_of_too_few_filters_serves_nothing() -> None:
    x, weight = given(CONV)
    _, fit = site_of(CONV, x, weight)
    few = dataclasses.replace(fit, nested={"channels": fitted(CONV, x, weight, ranks=5)[0]})
    for known in (few, dataclasses.replace(fit, nested={})):
        assert not known.serves(BRANCH2, CONV, 8, 4)
        assert known.of(BRANCH2, CONV, 8, 4) == 1.0


@pytest.mark.parametrize("terms", [2, 4, 8])
def test_sizes_that_are_tried_are_few_and_of_whole_blocks(terms: int) -> None:
    found = of_terms(256, 256, terms)
    assert 0 < len(found) <= 6
    assert all(rank % (8 * terms) == inner % (8 * terms) == 0 and inner <= rank <= 128 for rank, inner in found)
    assert of_terms(16, 16, terms) == []
