"""Steps of a latency curve: what is timed, what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.staircase import TILE, rank_grid, refine, right_edges, steps

BLOCKED = {16: 1.0, 24: 2.0, 32: 1.5, 40: 2.6, 48: 2.0, 64: 2.01}
"""A convolution in blocks of 16: ranks between two multiples are slow."""


def test_only_right_edges_stay() -> None:
    assert right_edges(BLOCKED, 0.02) == {16: 1.0, 32: 1.5, 64: 2.01}


@given(st.dictionaries(st.integers(1, 500), st.floats(0.01, 100.0), max_size=30), st.floats(0.0, 0.1))
def test_what_stays_rises_and_nothing_larger_is_as_fast(ms: dict[int, float], noise: float) -> None:
    kept = right_edges(ms, noise)
    times = list(kept.values())
    assert times == sorted(times)
    assert list(kept) == sorted(kept)
    for rank, time in kept.items():
        assert all(other > time for larger, other in ms.items() if larger > rank)
    for rank in ms.keys() - kept.keys():
        assert any(larger > rank and other <= ms[rank] * (1 + noise) for larger, other in kept.items())


@given(st.integers(0, 5000))
def test_the_grid_is_small_and_within_the_rank(max_rank: int) -> None:
    grid = rank_grid(max_rank)
    assert all(1 <= rank <= max_rank for rank in grid)
    assert len(grid) <= 25
    assert bool(grid) == (max_rank > 0)
    if max_rank >= 16:
        assert max_rank // 16 * 16 in grid


def test_steep_steps_are_refined_at_multiples_of_16() -> None:
    ms = {16: 1.0, 128: 5.0, 256: 9.0, 272: 9.1}
    assert refine(ms, 10.0, 0.01, range(16, 273)) == (64, 192)
    assert refine(ms, 10.0, 0.01, range(16, 100)) == (64,)  # only what may be asked for


def test_what_is_slower_than_dense_is_not_looked_at() -> None:
    assert refine({16: 1.0, 128: 5.0, 256: 9.0}, 4.0, 0.01, range(16, 256)) == ()


def on_a_card(tile: int, rows: int, processors: int, launch: float = 0.01) -> Callable[[int], float]:
    """Milliseconds of a product with r columns: waves of tiles over the processors, never less than a launch."""

    def ms(rank: int) -> float:
        waves = math.ceil(rows * math.ceil(rank / tile) / processors)
        return max(launch, 0.02 * waves)

    return ms


def found_edges(ms: Callable[[int], float], most: int, dense: float, rounds: int) -> dict[int, float]:
    """What the finder keeps after so many refinements, as `candidates` uses it."""
    known = {rank: ms(rank) for rank in rank_grid(most)}
    for _ in range(rounds):
        known |= {rank: ms(rank) for rank in refine(known, dense, 0.01, range(TILE, most + 1))}
    return right_edges(known, 0.01)


@pytest.mark.parametrize(("tile", "rows", "processors"), [(16, 24, 132), (32, 40, 132), (64, 16, 108), (128, 33, 132)])
def test_the_last_rank_of_every_wave_is_found(tile: int, rows: int, processors: int) -> None:
    ms = on_a_card(tile, rows, processors)
    most = 768
    ranks = range(TILE, most + 1, TILE)
    true = {r for r in ranks if r == most or ms(r + TILE) > ms(r)}
    found = found_edges(ms, most, dense=ms(most) * 1.01, rounds=6)  # every wave is more than 8 % of it
    assert {r for r in found if r >= TILE} == {r for r in true if ms(r) > 0.01}


def test_where_launches_decide_only_the_largest_rank_stays() -> None:
    def ms(rank: int) -> float:
        return max(0.02, rank * 1e-4)

    found = found_edges(ms, 384, dense=0.05, rounds=5)
    assert 192 <= min(found) <= 200  # all smaller ranks take the time of a launch
    assert set(steps({rank: ms(rank) for rank in range(16, 385, 16)}, 0.01)["edges"]) == set(range(192, 385, 16))  # type: ignore[call-overload]


def test_launch_bound_noise_makes_no_steps() -> None:
    flat = {rank: 0.02 * (1 + 0.004 * (-1) ** rank) for rank in range(1, 257)}
    assert list(right_edges(flat, 0.01)) == [256]
    assert refine(flat, 0.05, 0.01, range(16, 257)) == ()
    assert steps(flat, 0.01)["flat"] == 256


def test_the_multiple_that_a_card_rewards_is_named() -> None:
    ms = on_a_card(64, 132, 132)
    found = steps({rank: ms(rank) for rank in range(8, 513, 8)}, 0.01)
    assert found["multiple"] == 64
    assert steps({rank: rank / 100 for rank in (16, 40, 72)}, 0.01)["multiple"] is None
