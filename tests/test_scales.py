"""Factors of one scale: the product is the same, float16 holds them, and what passes between them fits too."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.fragment import Kind
from onnx_lowrank.fragments import fragment_model
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.runtime import Session, with_outputs
from onnx_lowrank.scales import levelled, levelled_in_turn
from onnx_lowrank.sites import Geometry

HALF = np.finfo(np.float16)
LINEAR = Geometry("MatMul", 256, 96, "float16", False, 17, x_shape=(40, 96))
GROUPED = Geometry(
    "Conv", 256, 24, "float16", True, 17, channels=24, kernel=(1, 1), strides=(1, 1), dilations=(1, 1),
    pads=(0,) * 4, groups=4, x_shape=(1, 96, 7, 6),
)  # fmt: skip
CONV = dataclasses.replace(
    GROUPED, outputs=64, inputs=72, channels=8, groups=1, kernel=(3, 3), pads=(1,) * 4, x_shape=(1, 8, 9, 7)
)
CASES = [
    pytest.param(kind, geometry, id=f"{kind.name} {geometry.op} {geometry.groups}")
    for kind in KINDS
    for geometry in (LINEAR, GROUPED, CONV)
    if kind.applies(geometry) and kind is not PIVOT
]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(-60, 60))
def test_the_product_stays_to_the_last_bit(seed: int, rank: int, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((rank, 5)), rng.standard_normal((rank, 7))
    first *= 2.0 ** (exponent * rng.standard_normal((rank, 1)))
    a, b = levelled(first, second, 7)
    assert np.array_equal(b.T @ a, second.T @ first)
    rows = np.linalg.norm(a, axis=1)
    assert rows.max() / rows.min() <= 2 + 1e-9


def test_thin_channels_are_a_quarter_as_large_as_outputs() -> None:
    """Independent inputs of variance one: the deviations are the norms of rows, up to the rounding of the scale."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((400, 8)))
    right = rng.standard_normal((8, 60)) * 10.0 ** np.arange(-4, 4)[:, None]
    thin, read = levelled(right, left.T, 400)
    outputs = np.linalg.norm(read.T @ thin, axis=1)
    ratio = 4 * np.linalg.norm(thin, axis=1) / np.sqrt(np.mean(outputs**2))
    assert (ratio >= 2**-0.5 - 1e-9).all()
    assert (ratio <= 2**0.5 + 1e-9).all()


def test_channels_that_are_zero_stay() -> None:
    first, second = np.array([[0.0, 0], [4, 3]]), np.array([[1.0, 2, 3], [0, 2, 0]])
    a, b = levelled(first, second, 3)
    assert np.array_equal(a[0], first[0])
    assert np.array_equal(b[0], second[0])
    assert all(np.isfinite(f).all() for f in levelled(np.zeros((2, 3)), second, 3))


def ill_scaled(kind: Kind, geometry: Geometry, largest: float) -> list[npt.NDArray[np.float64]]:
    """Factors of a map whose largest output is `largest`, each channel of its own wild scale."""
    rng = np.random.default_rng(1)
    size = (4, 4) if kind.ranks == 2 else (4, 0)
    parts = [rng.standard_normal(shape) for shape in kind.shapes(geometry, *kind.size(*size))]
    if kind.split is None:  # left and right
        parts.reverse()
    wild = 10.0 ** rng.permutation(np.linspace(-8, 8, len(parts[0])))
    parts[0] *= wild[:, None]
    groups = geometry.groups if kind.split is None else kind.terms
    by_channel = parts[1].reshape(groups, len(parts[1]) // groups, len(wild) // groups, -1)
    parts[1] = (by_channel / wild.reshape(groups, 1, -1, 1)).reshape(parts[1].shape)
    parts[-1] *= largest
    return parts[::-1] if kind.split is None else parts


def ran(kind: Kind, geometry: Geometry, parts: list[Any], x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of the fragment, each node's result rounded to the type."""
    model = fragment_model(kind.build(geometry, *parts, np.zeros(geometry.outputs)), geometry)
    names = [node.output[0] for node in model.graph.node]
    return dict(zip(names, Session(with_outputs(model, names), optimisations="disable_all").run({"x": x}), strict=True))


@pytest.mark.parametrize(("kind", "geometry"), CASES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 3e3])
def test_float16_holds_the_factors_and_what_passes_between_them(kind: Kind, geometry: Geometry, scale: float) -> None:
    """Entries beyond the range of the type before; afterwards the loss is that of rounding three times."""
    exact = dataclasses.replace(geometry, dtype="float32")
    x = np.random.default_rng(2).standard_normal(geometry.x_shape).astype(np.float16)
    power = float(np.abs(ran(kind, exact, ill_scaled(kind, geometry, 1.0), x.astype(np.float32))["y"]).max())
    parts = ill_scaled(kind, geometry, 10 * scale / power)
    smallest, largest = (f(np.abs(part).max() for part in parts) for f in (min, max))
    assert largest > HALF.max or smallest < HALF.smallest_subnormal
    expected = ran(kind, exact, parts, x.astype(np.float32))["y"]
    found = ran(kind, geometry, parts, x)
    assert all(np.isfinite(value).all() for value in found.values())
    off = np.linalg.norm(found["y"].astype(np.float64) - expected) / np.linalg.norm(expected)
    assert off <= 4 * float(HALF.eps)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_type_stores_finite_factors(dtype: str) -> None:
    geometry = dataclasses.replace(LINEAR, dtype=dtype)
    for kind in (kind for kind in KINDS if kind.applies(geometry) and kind is not PIVOT):
        fragment = kind.build(geometry, *ill_scaled(kind, geometry, 1.0), np.zeros(geometry.outputs))
        assert all(np.isfinite(a.astype(np.float64)).all() for a in fragment.constants.values())


def test_three_factors_are_levelled_from_the_last() -> None:
    rng = np.random.default_rng(3)
    first, core, last = rng.standard_normal((3, 4)) * 1e5, rng.standard_normal((5, 3 * 9)), rng.standard_normal((8, 5))
    a, b, c = levelled_in_turn(first, core * 1e-5, last)
    before, after = (
        np.einsum("nr,rst,sc->nct", w, v.reshape(5, 3, 9), u) for u, v, w in ((first, core, last), (a, b, c))
    )
    assert after == pytest.approx(1e-5 * before)


def test_a_dense_fragment_is_left_as_it_is() -> None:
    weight = np.random.default_rng(4).standard_normal((256, 96))
    (stored,) = dense_fragment(LINEAR, weight, np.zeros(256)).constants.values()
    assert np.array_equal(stored, weight.T.astype(np.float16))
