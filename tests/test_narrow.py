"""Fewer channels of a hidden layer: the error is the predicted one, and redundancy costs nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.linalg import Array
from onnx_lowrank.narrow import Narrow, narrowed

FLOOR = 1e-6  # the least power of a direction, of the mean: what redundancy may cost


def moment(rng: np.random.Generator, width: int, count: int = 400) -> Array:
    x = rng.standard_normal((count, width)) @ rng.standard_normal((width, width))
    return np.asarray(x.T @ x / count)


def error(narrow: Narrow, weight: Array, width: int) -> float:
    """`E‖Wx − Ŵx‖² / E‖Wx‖²` from its definition."""
    lost = weight - narrow.scattered(weight, width)
    return float(np.trace(lost @ narrow.second @ lost.T) / np.trace(weight @ narrow.second @ weight.T))


@given(st.integers(0, 2**16), st.sampled_from([1, 4]))
def test_the_predicted_error_is_that_of_the_weight_and_falls_with_the_width(seed: int, taps: int) -> None:
    rng = np.random.default_rng(seed)
    weight, second = rng.standard_normal((5, 12 * taps)), moment(rng, 12 * taps)
    narrow = narrowed("p", weight, second, np.zeros(12 * taps), taps)
    errors = [narrow.relative(width) for width in range(narrow.least, 13)]
    assert errors == pytest.approx([error(narrow, weight, width) for width in range(narrow.least, 13)], abs=1e-9)
    assert errors[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(errors))


def test_the_weight_at_full_width_is_the_weight() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 8))
    narrow = narrowed("p", weight, moment(rng, 8), np.zeros(8), 1)
    assert np.array_equal(narrow.weight(weight, 8), weight)
    assert list(narrow.kept(8)) == list(range(8))


def test_dead_equal_and_dependent_channels_go_first_and_cost_nothing() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1000, 12))
    x[:, 3] = 0
    x[:, 5] = x[:, 9]
    x[:, 7] = x[:, 0] - 2 * x[:, 1]
    weight = rng.standard_normal((6, 12))
    narrow = narrowed("p", weight, x.T @ x / 1000, np.zeros(12), 1)
    kept = narrow.kept(9)
    assert narrow.relative(9) < 10 * FLOOR
    assert 3 not in kept
    assert len({5, 9} & set(kept)) == 1
    assert len({0, 1, 7} & set(kept)) == 2
    assert np.allclose(x[:, kept] @ narrow.weight(weight, 9).T, x @ weight.T, atol=1e-3)
    assert narrow.relative(8) > 0.01


def test_the_first_channel_to_go_is_the_one_that_is_missed_least() -> None:
    """Against trying every one of them."""
    rng = np.random.default_rng(2)
    weight, second = rng.standard_normal((4, 10)), moment(rng, 10)
    narrow = narrowed("p", weight, second, np.zeros(10), 1)

    def without(channel: int) -> float:
        kept = np.delete(np.arange(10), channel)
        best = weight @ second[:, kept] @ np.linalg.inv(second[np.ix_(kept, kept)])
        lost = weight.copy()
        lost[:, kept] -= best
        return float(np.trace(lost @ second @ lost.T))

    assert narrow.order[-1] == min(range(10), key=without)


def test_channels_of_a_kernel_go_with_all_their_taps() -> None:
    rng = np.random.default_rng(3)
    weight, second = rng.standard_normal((4, 6 * 9)), moment(rng, 6 * 9)
    weight[:, 2 * 9 : 3 * 9] = 0
    second[2 * 9 : 3 * 9] = 0
    second[:, 2 * 9 : 3 * 9] = 0
    narrow = narrowed("p", weight, second, np.zeros(54), 9)
    assert narrow.order[-1] == 2
    assert narrow.relative(5) == pytest.approx(0, abs=FLOOR)
    assert narrow.weight(weight, 5).shape == (4, 45)
    assert not narrow.scattered(weight, 5)[:, 18:27].any()


def test_below_the_smallest_width_nothing_is_known() -> None:
    rng = np.random.default_rng(4)
    narrow = narrowed("p", rng.standard_normal((4, 16)), moment(rng, 16), np.zeros(16), 1)
    assert narrow.least == 2
    assert narrow.relative(1) == 1


def test_a_layer_that_is_silent_costs_nothing() -> None:
    narrow = narrowed("p", np.ones((2, 8)), np.zeros((8, 8)), np.zeros(8), 1)
    assert narrow.relative(4) == pytest.approx(0)
