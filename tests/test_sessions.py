"""Ratios over groups of sessions: exact on constructed times, honest on simulated ones; no absolute time asserted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest

from onnx_lowrank import sessions, timing
from onnx_lowrank.streams import throughput
from onnx_lowrank.timing import Ratio

GROUPS, ROUNDS = 8, 9


def times(rng: np.random.Generator, session_noise: float, run_noise: float) -> np.ndarray:
    """Seconds of one model: each group has a factor of its own, each run another."""
    groups = np.repeat(np.exp(session_noise * rng.standard_normal(GROUPS)), ROUNDS)
    return np.asarray(groups * np.exp(run_noise * rng.standard_normal(GROUPS * ROUNDS)))


def contains(found: Ratio, truth: float) -> bool:
    return found.low <= truth <= found.high


def test_a_constant_factor_is_found_exactly() -> None:
    noise = np.random.default_rng(0).uniform(1, 10, 30)
    found = sessions.ratio(3 * noise, 2 * noise, [10, 10, 10])
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_is_students_t_over_the_groups() -> None:
    factors = np.array([1.0, 1.1, 1.2])
    found = sessions.ratio(np.repeat(factors, 4), np.ones(12), [4, 4, 4])
    logs = np.log(factors)
    half = 4.302653 * logs.std(ddof=1) / np.sqrt(3)  # two degrees of freedom
    assert np.log([found.low, found.value, found.high]) == pytest.approx(
        [logs.mean() - half, logs.mean(), logs.mean() + half], rel=1e-6
    )


def test_groups_that_agree_by_chance_are_as_wide_as_the_control() -> None:
    control = np.repeat([1.0, 1.02, 0.98], 4)
    alone = sessions.ratio(np.ones(12), np.ones(12), [4, 4, 4])
    assert alone.low == alone.high == 1
    assert sessions.ratio(np.ones(12), np.ones(12), [4, 4, 4], control).low < 0.97


def test_a_model_against_itself_contains_one_where_rounds_alone_do_not() -> None:
    """Sessions that differ by 1.5 %: the interval over groups holds 1, a bootstrap over rounds does not."""
    held = narrow = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        control, first, second = (times(rng, 0.015, 0.01) for _ in range(3))
        held += contains(sessions.ratio(first, second, [ROUNDS] * GROUPS, control), 1.0)
        narrow += contains(timing.paired_ratio(first[:ROUNDS], second[:ROUNDS], resamples=200), 1.0)
    assert held >= 188  # of 97.7 %: fewer has a probability below 0.3 %
    assert narrow < 120


def test_every_group_opens_every_model_once_and_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_ROUNDS", 4)
    opened: list[int] = []

    def opener(index: int) -> sessions.Opener:
        def open_one() -> Callable[[], object]:
            opened.append(index)
            return lambda: sum(range(500))

        return open_one

    found = sessions.race([opener(i) for i in range(3)], seconds=30, seed=0)
    orders = [tuple(opened[i : i + 3]) for i in range(0, len(opened), 3)]
    assert found.groups == (4,) * sessions.GROUPS
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 1
    assert found.samples.wall.shape == (4 * sessions.GROUPS, 3)
    assert min(found.speed) == 1


def test_without_time_the_least_groups_of_two_rounds_are_made() -> None:
    found = sessions.race([lambda: lambda: None, lambda: lambda: None], seconds=0, seed=0)
    assert found.groups == (2,) * sessions.LEAST_GROUPS


def test_warming_up_ends_when_nothing_gets_faster() -> None:
    calls: list[int] = []
    assert timing.warm_up([lambda: calls.append(0)], seconds=0) == 1
    assert len(calls) == 1
    naps = itertools.chain([0.3], itertools.repeat(0.02))
    assert timing.warm_up([lambda: time.sleep(next(naps))], seconds=60) >= 3  # the second beat the first by far


def test_streams_run_at_the_same_time() -> None:
    """A run that waits for another one ends only when two threads are inside."""
    import threading

    meeting = threading.Barrier(2)
    rates = throughput([lambda: meeting.wait(timeout=20)], 2, seed=0, seconds=0.0)
    assert rates.shape == (5, 1), "windows, runs"
    assert (rates > 0).all()


def test_a_fault_in_a_stream_is_raised() -> None:
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        throughput([fail], 2, seed=0, seconds=0.0)
