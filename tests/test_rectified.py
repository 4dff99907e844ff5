"""The elementwise step against a search, and the last factor on data where only a ReLU's positive side matters."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.rectified import auxiliary, rectified


@pytest.mark.parametrize("penalty", [0.01, 0.3, 1.0, 10.0])
def test_auxiliary_values_are_the_minimum_of_a_search(penalty: float) -> None:
    rng = np.random.default_rng(0)
    y, predicted = rng.standard_normal((2, 40)) * 2
    z = np.linspace(-8, 8, 40_001)[:, None]
    loss = (np.maximum(y, 0) - np.maximum(z, 0)) ** 2 + penalty * (z - predicted) ** 2
    found = auxiliary(np.maximum(y, 0), predicted, penalty)
    reached = (np.maximum(y, 0) - np.maximum(found, 0)) ** 2 + penalty * (found - predicted) ** 2
    assert reached == pytest.approx(loss.min(axis=0), abs=1e-6)


def data(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four features that cannot explain a target which depends on them through a bend below zero."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((count, 4))
    linear = z @ rng.standard_normal((4, 6)) + 0.3
    return z, np.where(linear > 0, linear, 3 * linear), linear


def test_what_a_relu_hides_is_given_up_for_what_it_shows() -> None:
    z, target, _ = data(4000)
    start = np.linalg.lstsq(np.hstack([z, np.ones((len(z), 1))]), target, rcond=None)[0].T
    last, bias = rectified(z, target, start[:, :4], start[:, 4])
    fresh, wanted, _ = data(4000, seed=0)

    def loss(last: np.ndarray, bias: np.ndarray) -> float:
        return float(np.sum((np.maximum(fresh @ last.T + bias, 0) - np.maximum(wanted, 0)) ** 2))

    assert loss(last, bias) < 0.1 * loss(start[:, :4], start[:, 4])


def test_a_perfect_fit_stays() -> None:
    z, _, linear = data(500)
    start = np.linalg.lstsq(np.hstack([z, np.ones((len(z), 1))]), linear, rcond=None)[0].T
    last, bias = rectified(z, linear, start[:, :4], start[:, 4])
    assert np.abs(z @ last.T + bias - linear).max() < 1e-6


@pytest.mark.parametrize("count", [1, 8])
def test_few_vectors_or_dead_features_change_nothing(count: int) -> None:
    z, target, _ = data(count)
    last, bias = np.ones((6, 4)), np.zeros(6)
    for features in (z, np.zeros((400, 4))):
        wanted = target if features is z else np.ones((400, 6))
        found = rectified(features, wanted, last, bias)
        assert found[0] is last
        assert found[1] is bias
