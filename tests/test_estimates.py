"""Estimates in words, in the page and in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from onnx_lowrank.estimates import estimates
from onnx_lowrank.html import html
from onnx_lowrank.markdown import markdown

if TYPE_CHECKING:
    from tests.conftest import Written

TIMES = {"before_ms": 490.2, "predicted_ms": 150.0, "measured_ms": 145.0, "corrected_sites": 17}


def test_predicted_and_measured_stand_side_by_side() -> None:
    first, second = estimates({"additivity": TIMES})
    assert "150.0 ms for the whole model, of 490.2 ms; built, it took 145.0 ms (+3 %)" in first
    assert "17 sites" in second


@pytest.mark.parametrize("additivity", [{}, None])
def test_nothing_is_said_where_nothing_was_chosen(additivity: Any) -> None:
    assert estimates({"additivity": additivity, "probes": {"checked": 9, "not_linear": []}}) == []


def test_losses_that_are_no_straight_line_are_counted() -> None:
    (said,) = estimates({"probes": {"checked": 9, "not_linear": ["a", "b"]}})
    assert "At 2 of 9 sites" in said


def test_reports_of_a_run_carry_them(written: dict[str, Written]) -> None:
    data = {**written["optimize"].data, "additivity": TIMES}
    empty = {**data, "additivity": {}}
    for made in (html, markdown):
        assert "built, it took 145.0 ms" in made(data)
        assert "built, it took" not in made(empty)
