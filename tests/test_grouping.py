"""Groups keep the order, the limit and the count."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.grouping import grouped


@given(st.lists(st.integers(0, 20)), st.integers(1, 30), st.one_of(st.none(), st.integers(1, 5)))
def test_groups_are_the_list_cut_where_it_must_be(sizes: list[int], limit: int, most: int | None) -> None:
    found = list(grouped(sizes, lambda size: size, limit, most))
    assert [size for group in found for size in group] == sizes
    assert all(group for group in found)
    assert all(sum(group) <= limit or len(group) == 1 for group in found)
    assert all(most is None or len(group) <= most for group in found)
    for group, after in itertools.pairwise(found):
        assert sum(group) + after[0] > limit or len(group) == most
