"""The search finds the last plan that holds, whatever the model of losses gets wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.plan import Decision
from onnx_lowrank.search import Found, search

Plans = list[tuple[float, tuple[Decision, ...]]]


def plans(count: int) -> Plans:
    return [(0.001 * (i + 1), (Decision(str(i), "MatMul", (1, 1)),)) for i in range(count)]


def index(decisions: tuple[Decision, ...]) -> int:
    return int(decisions[0].node)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_a_wrong_scale_is_corrected(scale: float) -> None:
    found = search(plans(100), lambda d: scale * 0.001 * (index(d) + 1), 0.05)
    assert found.holds is not None
    last = index(found.holds)
    assert 0.97 * 0.05 <= found.value <= 0.05 or scale * 0.001 * (last + 2) > 0.05 or last == 99


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_what_is_found_was_measured_to_hold(values: list[float], limit: float) -> None:
    truth = sorted(values)
    found = search(plans(len(truth)), lambda d: truth[index(d)], limit, rounds=60)
    last = sum(value <= limit for value in truth) - 1
    if last < 0:
        assert found.holds is None
        assert found.value == 0
    else:
        assert found.holds is not None
        assert found.value == truth[index(found.holds)] <= limit
        assert found.value >= 0.97 * limit or index(found.holds) == last
    if found.fails is not None:
        assert found.over == truth[index(found.fails)] > limit
        assert found.value >= 0.97 * limit or index(found.fails) == last + 1


def test_no_plan_no_answer() -> None:
    assert search([], lambda _: 0.0, 0.5) == Found()


def test_no_more_plans_are_built_than_allowed() -> None:
    built: list[int] = []

    def measured(decisions: tuple[Decision, ...]) -> float:
        built.append(index(decisions))
        return float(index(decisions) ** 3)

    search(plans(1000), measured, 500.5, rounds=3)
    assert len(built) == 3


def test_an_infinite_value_does_not_hold() -> None:
    found = search(plans(8), lambda d: float("inf") if index(d) > 2 else 0.0, 0.5, rounds=20)
    assert found.holds is not None
    assert index(found.holds) == 2
