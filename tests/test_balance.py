"""Factors made fit for 8 bits: the product stays what it was, channels get equal ranges, biases take back rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper, parser

from onnx_lowrank.balance import (
    Spread,
    balance,
    correct_biases,
    mix,
    mixing,
    rounded,
    scaling,
    second_factor,
    thin_tensors,
)
from onnx_lowrank.noise import balanced_scale, mixed_noise, pivot_noise
from onnx_lowrank.runtime import Session

CONVS = """<ir_version: 8, opset_import: ["" : 13]>
pair (float[1, 4, 6, 6] x) => (float[1, 5, 6, 6] y) {
  t = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, down)
  y = Conv<kernel_shape = [1, 1]>(t, up, bias)
}"""
WIDE = CONVS.replace("kernel_shape = [1, 1]", "kernel_shape = [1, 3], pads = [0, 1, 0, 1]")
MATMULS = """<ir_version: 8, opset_import: ["" : 13]>
pair (float[n, 4] x) => (float[n, 5] y) { t = MatMul(x, down)  y = MatMul(t, up) }"""


def model(text: str, **arrays: Any) -> onnx.ModelProto:
    found = parser.parse_model(text)
    found.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a, np.float32), name) for name, a in arrays.items()
    )
    return found


def convs(rng: np.random.Generator, wide: bool = False) -> onnx.ModelProto:
    down = rng.standard_normal((3, 4, 3, 3)) * np.array([1, 10, 0.1])[:, None, None, None]
    up = rng.standard_normal((5, 3, 1, 3 if wide else 1))
    return model(WIDE if wide else CONVS, down=down, up=up, bias=rng.standard_normal(5))


def run(given: onnx.ModelProto, x: npt.NDArray[Any], name: str = "y") -> npt.NDArray[Any]:
    copy = onnx.ModelProto.FromString(given.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return np.asarray(Session(copy, optimisations="disable_all").run({"x": x})[0])


def spread(thin: npt.NDArray[Any]) -> Spread:
    """Of r×positions."""
    wide = thin.astype(np.float64)
    return Spread(wide.min(1), wide.max(1), wide.mean(1), np.mean(wide**2, 1))


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 4, 3)])
def test_a_batch_of_matrices_has_no_axis_that_makes_the_channels(shape: tuple[int, ...]) -> None:
    text = MATMULS.replace("float[n, 4]", "float[n, 2, 4]").replace("float[n, 5]", "float[n, 2, 5]")
    plain, batch = np.ones((4, 3)), np.ones(shape)
    assert len(thin_tensors(model(text, down=plain, up=np.ones((3, 5))).graph)) == 1
    assert thin_tensors(model(text, down=batch, up=np.ones((3, 5))).graph) == []
    assert thin_tensors(model(text, down=plain, up=np.ones((*shape[:1], 3, 5))).graph) == []


@pytest.mark.parametrize("wide", [False, True])
def test_the_product_stays_and_the_widest_channel_has_range_one(wide: bool) -> None:
    rng = np.random.default_rng(0)
    pair = convs(rng, wide)
    x = rng.standard_normal((1, 4, 6, 6)).astype(np.float32) + 1
    before, thin = run(pair, x), run(pair, x, "t")[0].reshape(3, -1)
    (found,) = thin_tensors(pair.graph)
    assert found.pointwise is not wide
    scale, centre, _ = scaling(found, second_factor(pair.graph, found), spread(thin))
    assert centre.any() == found.pointwise, "a border of zeros stands for 0: no constant may be taken out before it"
    balance(pair.graph, found, scale, centre)
    np.testing.assert_allclose(run(pair, x), before, rtol=0, atol=2e-5 * np.abs(before).max())
    largest = np.abs(run(pair, x, "t")[0]).reshape(3, -1).max(1)
    assert largest.max() == pytest.approx(1.0, rel=1e-5)
    assert largest.min() > np.abs(thin).max(1).min() / np.abs(thin).max(), "ranges are nearer to each other"


def test_a_loud_channel_takes_the_scale_that_rounding_asks_for() -> None:
    """Weights that would be rounded away keep their levels: the power is below one where one channel is far louder."""
    rng = np.random.default_rng(7)
    second, half = rng.standard_normal((32, 24, 3)), np.geomspace(100, 1, 24)
    scale, least = balanced_scale(second, half, (half / 2) ** 2)
    exponent = np.log(scale[0] / scale[-1]) / np.log(half[0] / half[-1])
    assert 0 < exponent < 1
    thin = rng.uniform(-1, 1, (6000, 24)) * half
    exact = thin @ second[:, :, 0].T
    losses = {}
    for name, s in (("none", np.ones(24)), ("chosen", scale), ("ranges", half)):
        step = 2 * (half / s).max() / 255
        rounded_thin = np.rint(thin / s / step) * step
        losses[name] = float(np.mean((rounded_thin @ rounded(second[:, :, 0] * s).T - exact) ** 2))
    assert losses["chosen"] < min(losses["none"], losses["ranges"])
    assert least / 32 / 3 == pytest.approx(losses["chosen"], rel=0.6)


def test_a_pair_of_matmuls_is_balanced() -> None:
    rng = np.random.default_rng(1)
    pair = model(MATMULS, down=rng.standard_normal((4, 3)) * [1, 10, 100], up=rng.standard_normal((3, 5)))
    x = rng.standard_normal((7, 4)).astype(np.float32)
    before = run(pair, x)
    (found,) = thin_tensors(pair.graph)
    balance(pair.graph, found, np.array([1.0, 10.0, 100.0]), np.zeros(3))
    np.testing.assert_allclose(run(pair, x), before, rtol=0, atol=1e-5 * np.abs(before).max())
    arrays = {t.name: numpy_helper.to_array(t) for t in pair.graph.initializer}
    assert 0.1 < np.abs(arrays["down"]).max(0).min() / np.abs(arrays["down"]).max() <= 1


@pytest.mark.parametrize("wide", [False, True])
def test_mixing_keeps_the_product_of_convolutions(wide: bool) -> None:
    rng = np.random.default_rng(8)
    pair = convs(rng, wide)
    pair.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(3).astype(np.float32), "first bias"))
    pair.graph.node[0].input.append("first bias")
    x = rng.standard_normal((1, 4, 6, 6)).astype(np.float32)
    before = run(pair, x)
    (found,) = thin_tensors(pair.graph)
    mixed = mixing(second_factor(pair.graph, found))
    assert mixed is not None
    mix(pair.graph, found, mixed)
    np.testing.assert_allclose(run(pair, x), before, rtol=0, atol=2e-5 * np.abs(before).max())
    columns = np.moveaxis(numpy_helper.to_array(pair.graph.initializer[1]), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(columns.T @ columns, np.eye(3), atol=1e-5)


def test_mixing_spreads_a_loud_channel_and_leaves_less_noise_than_scaling() -> None:
    """Peaks that one channel has now and then set the step of all; turned, every channel has a part of them."""
    rng = np.random.default_rng(9)
    rank = 32
    pair = model(MATMULS, down=rng.standard_normal((4, rank)), up=rng.standard_normal((rank, 48)))
    thin = rng.standard_t(3, (6000, rank)) * np.geomspace(30, 1, rank)
    (found,) = thin_tensors(pair.graph)
    losses: list[float] = []
    noises: list[float] = []
    second = numpy_helper.to_array(pair.graph.initializer[1]).astype(np.float64)
    exact = thin @ second
    for mixed in (False, True):
        if mixed:
            turn = mixing(second_factor(pair.graph, found))
            assert turn is not None
            mix(pair.graph, found, turn)
            turned = numpy_helper.to_array(pair.graph.initializer[1]).astype(np.float64)
            second, thin = turned, thin @ second @ np.linalg.pinv(turned)
        scale, _, noise = scaling(found, second_factor(pair.graph, found), spread(thin.T))
        noises.append(noise)
        step = 2 * np.abs(thin / scale).max() / 255
        rounded_thin = np.rint(thin / scale / step) * step
        losses.append(np.sum((rounded_thin @ rounded((second * scale[:, None]).T).T - exact) ** 2) / np.sum(exact**2))
    assert losses[1] < losses[0] / 2
    assert noises[1] < noises[0] / 2, "and the estimate, by which one of them is taken, says so"


def test_what_cannot_be_turned_without_loss_is_not_mixed() -> None:
    rng = np.random.default_rng(10)
    second = rng.standard_normal((5, 9, 1))
    assert mixing(second) is None, "fewer entries for a channel than channels"
    second = rng.standard_normal((9, 5, 1))
    second[:, 4] = second[:, 3] + 1e-9
    assert mixing(second) is None, "channels that the second factor hardly tells apart"
    assert mixing(rng.standard_normal((9, 1, 1))) is None, "a single channel"
    assert mixing(rng.standard_normal((9, 5, 1))) is not None


def test_a_tensor_with_a_second_reader_is_no_pair() -> None:
    text = CONVS.replace("y = Conv", "z = Relu(t)\n  y = Conv")
    rng = np.random.default_rng(2)
    given = model(text, down=rng.standard_normal((3, 4, 3, 3)), up=rng.standard_normal((5, 3, 1, 1)), bias=np.zeros(5))
    assert not thin_tensors(given.graph)


def test_rounding_is_that_of_the_quantizer() -> None:
    """Symmetric, a scale for each output: errors of at most half a step, and the largest entry is kept."""
    weight = np.random.default_rng(3).standard_normal((6, 5, 3))
    step = np.abs(weight).reshape(6, -1).max(1) / 127
    assert (np.abs(rounded(weight) - weight).reshape(6, -1).max(1) <= step / 2 + 1e-12).all()
    assert np.allclose(np.abs(rounded(weight)).reshape(6, -1).max(1), np.abs(weight).reshape(6, -1).max(1))


def test_biases_take_back_the_mean_of_rounding() -> None:
    """On a constant input the rounded weight with the corrected bias gives what the weight gave."""
    rng = np.random.default_rng(4)
    down = rng.standard_normal((3, 4, 1, 1))
    text = CONVS.replace("Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, down)", "Relu(x)").replace(
        "[1, 5", "[1, 3"
    )
    given = model(text, up=down, bias=rng.standard_normal(3))
    x = np.full((1, 4, 6, 6), 1.0, np.float32) * np.array([1, 2, 3, 4], np.float32)[:, None, None]
    before = run(given, x)
    correct_biases(given.graph, {"t": np.array([1.0, 2.0, 3.0, 4.0])})
    for tensor in given.graph.initializer:
        if tensor.name == "up":
            tensor.CopyFrom(numpy_helper.from_array(rounded(down).astype(np.float32), "up"))
    np.testing.assert_allclose(run(given, x), before, atol=1e-5)


def _simulated(second: npt.NDArray[Any], thin: npt.NDArray[Any], exact: npt.NDArray[Any]) -> float:
    """Relative error of 8 bits: one scale for all of `thin` (six standard deviations), a scale a row for `second`."""
    half = 6 * thin.std(0).max()
    rounded_thin = np.rint(thin / half * 127.5) / 127.5 * half
    return float(np.sum((rounded_thin @ rounded(second).T - exact) ** 2) / np.sum(exact**2))


def test_the_noise_of_mixed_factors_is_what_rounding_does() -> None:
    """Whatever the spectrum is; the simulation has no peaks above four standard deviations, the estimate allows six."""
    rng = np.random.default_rng(5)
    for rank, last in ((12, 1e-3), (48, 1.0), (48, 1e-6)):
        pair = model(MATMULS, down=rng.standard_normal((4, rank)), up=_decaying(rng, rank, last))
        thin = rng.standard_normal((4000, rank))
        (found,) = thin_tensors(pair.graph)
        before = numpy_helper.to_array(pair.graph.initializer[1]).astype(np.float64)
        turn = mixing(second_factor(pair.graph, found))
        assert turn is not None
        mix(pair.graph, found, turn)
        second = numpy_helper.to_array(pair.graph.initializer[1]).astype(np.float64)
        mixed = thin @ before @ np.linalg.pinv(second)
        scale = scaling(found, second_factor(pair.graph, found), spread(mixed.T))[0]
        simulated = _simulated((second * scale[:, None]).T, mixed / scale, mixed @ second)
        assert simulated / 2 < mixed_noise([rank]) < 2 * simulated


def _decaying(rng: np.random.Generator, rank: int, last: float) -> npt.NDArray[Any]:
    """A second factor r×64 whose rows fall from 1 to the root of `last`."""
    return np.linalg.qr(rng.standard_normal((64, rank)))[0].T * np.sqrt(np.geomspace(1, last, rank))[:, None]


def test_the_noise_of_pivots_is_what_rounding_does_and_grows_with_the_coefficients() -> None:
    rng = np.random.default_rng(6)
    values = np.ones(8)
    noises = []
    for amplified in (1.0, 20.0):
        left = np.linalg.qr(np.vstack([np.eye(8), amplified * rng.uniform(-1, 1, (24, 8))]))[0]
        coefficients = left[8:] @ np.linalg.inv(left[:8])
        pivots = rng.standard_normal((4000, 8)) @ left[:8].T
        rest = pivots @ coefficients.T
        found = _simulated(coefficients, pivots, rest) * np.sum(rest**2) / (np.sum(rest**2) + np.sum(pivots**2))
        noises.append((pivot_noise(left, values), found))
    for estimated, found in noises:
        assert found / 4 < estimated < 4 * found
    assert noises[1][0] > 3 * noises[0][0]
