"""Interleaving and paired ratios; no absolute time is asserted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnx_lowrank.timing import interleave, paired_ratio, summary


def recorder(log: list[int], index: int) -> Callable[[], None]:
    return lambda: log.append(index)


def test_every_run_happens_once_a_round_in_changing_order() -> None:
    log: list[int] = []
    runs = [recorder(log, i) for i in range(5)]
    samples = interleave(runs, rounds=20, seconds=60, seed=0, warmup=1)
    rounds = np.array(log[5:]).reshape(20, 5)
    assert samples.cpu.shape == samples.wall.shape == (20, 5)
    assert all(sorted(order) == list(range(5)) for order in rounds.tolist())
    assert len({tuple(order) for order in rounds.tolist()}) > 10


def test_without_time_the_fewest_rounds_are_made() -> None:
    assert len(interleave([lambda: None], rounds=50, seconds=0, seed=0, min_rounds=7).cpu) == 7


def test_a_constant_factor_is_found_exactly_through_common_noise() -> None:
    noise = np.random.default_rng(0).uniform(1, 10, 40)
    found = paired_ratio(3 * noise, 2 * noise)
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_the_same_thing_twice_has_a_ratio_of_one_in_its_interval() -> None:
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        a, b = rng.lognormal(0, 0.05, (2, 41))
        found = paired_ratio(a, b, seed=seed)
        inside += found.low <= 1 <= found.high
    assert inside >= 88  # a 95 % interval: fewer than 88 of 100 has a probability below 0.5 %


def test_percentiles_wait_for_enough_runs() -> None:
    assert set(summary(np.ones(63))) == {"runs", "p50_ms", "mean_ms"}
    assert "p90_ms" in summary(np.ones(64))
    assert "p99_ms" in summary(np.ones(662))
    assert summary(np.array([0.001, 0.003]))["mean_ms"] == pytest.approx(2.0)
