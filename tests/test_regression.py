"""Joint moments and the step towards the best linear map, with exact maps as oracles."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.regression import Joint, JointMoments, towards


def moments(x: np.ndarray, y: np.ndarray, *, centred: bool = True) -> Joint:
    found = JointMoments(x.shape[1], y.shape[1])
    for start in range(0, len(x), 700):
        found.add(x[start : start + 700], y[start : start + 700])
    return found.settled(centred=centred)


def test_moments_are_numpys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5000, 6)) + 1, rng.standard_normal((5000, 4)) - 2
    found = moments(x, y)
    whole = np.cov(np.hstack([x, y]).T, bias=True)
    assert found.count == 5000
    assert found.second == pytest.approx(whole[:6, :6])
    assert found.cross == pytest.approx(whole[6:, :6], abs=1e-12)
    assert found.mean == pytest.approx(x.mean(axis=0))
    assert found.mean_y == pytest.approx(y.mean(axis=0))
    plain = moments(x, y, centred=False)
    assert plain.second == pytest.approx(x.T @ x / 5000)
    assert plain.cross == pytest.approx(y.T @ x / 5000)


def test_a_linear_target_is_reached_by_its_share() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((20000, 6))
    weight, truth = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    found = moments(x, x @ truth.T)
    for share in (0.0, 0.5, 1.0):
        step = towards(weight, found.second, found.cross, found.count, share)
        # The ridge of 1e-4 of the mean variance is all that is missing.
        assert step == pytest.approx(weight + share * (truth - weight), abs=1e-3)


def test_a_weight_that_is_right_stays() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 40))
    weight = rng.standard_normal((4, 40))
    found = moments(x, x @ weight.T)
    step = towards(weight, found.second, found.cross, found.count, 1.0)
    assert step == pytest.approx(weight, abs=1e-9)


def test_few_vectors_move_a_weight_less_than_many() -> None:
    rng = np.random.default_rng(3)
    weight = np.zeros((1, 30))

    def moved(count: int) -> float:
        x = rng.standard_normal((count, 30))
        found = moments(x, x[:, :1])
        step = towards(weight, found.second, found.cross, count, 1.0)
        return float(np.abs(step - np.eye(1, 30)).max())

    assert moved(20000) < 0.01 < moved(8)


def test_nothing_is_learnt_from_nothing() -> None:
    weight = np.ones((2, 3))
    assert towards(weight, np.zeros((3, 3)), np.zeros((2, 3)), 0, 1.0) is weight


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        JointMoments(2).add(np.array([[np.nan, 1.0]]))
