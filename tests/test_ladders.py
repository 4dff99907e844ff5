"""Which sizes are worth timing: pairs of ranks on the edge of work and error, and sizes that others beat."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnx_lowrank.ladders import Entry, axis, competing, rungs


def pairs(most: int = 8) -> list[Entry]:
    """Errors fall with both ranks; the inner one matters four times as much."""
    sizes = [(inner, rank) for inner in range(1, most + 1) for rank in range(1, most + 1)]
    return [Entry("tucker", r, s, 10 * s + s * r + 10 * r, 0.8**r + 4 * 0.8**s, 2) for s, r in sizes]


def test_rungs_are_on_the_lower_edge_and_spread_over_the_work() -> None:
    found = rungs(pairs(), 3.0, points=5)
    assert len(found) == 5
    assert all(a.macs < b.macs and a.error > b.error for a, b in itertools.pairwise(found))
    for one in found:
        assert not [e for e in pairs() if e.macs <= one.macs and e.error < one.error]
    allowed = [e for e in pairs() if e.error <= 3.0]
    assert found[0].macs == min(e.macs for e in allowed)
    assert found[-1].error == min(e.error for e in allowed)
    steps = np.diff(np.log([e.macs for e in found]))
    assert steps.max() < 2 * steps.min()


def test_few_sizes_are_all_kept_and_large_errors_none() -> None:
    assert len(rungs(pairs(2), 10.0)) <= 4
    assert rungs(pairs(), 0.1) == []


@pytest.mark.parametrize(("most", "expected"), [(1, ()), (12, (2, 4, 8, 12)), (40, (8, 16, 32)), (512, 16), (700, 16)])
def test_ranks_of_a_pair_are_whole_tiles(most: int, expected: tuple[int, ...] | int) -> None:
    found = axis(most)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert len(found) <= expected
        assert found[-1] == most // 16 * 16
        assert all(r % 16 == 0 for r in found)


def test_a_size_that_another_kind_beats_is_not_timed() -> None:
    good = Entry("spatial", 8, 0, 100, 0.01)
    worse = Entry("conv_svd", 8, 0, 200, 0.02)
    near = Entry("pivot", 8, 0, 120, 0.02)
    same = Entry("spatial", 4, 0, 20, 0.2)
    assert competing([good, worse, near, same]) == [good, near, same]


def test_a_kind_with_one_node_more_must_save_work() -> None:
    good = Entry("spatial", 8, 0, 100, 0.01)
    assert competing([good, Entry("tucker", 8, 8, 100, 0.01, 2)]) == [good]
    better = Entry("tucker", 8, 8, 100, 0.009, 2)
    assert competing([good, better]) == [good, better]
