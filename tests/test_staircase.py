"""Steps of a latency curve: what is timed, what is kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.staircase import rank_grid, refine, right_edges

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
