"""A plan that a repair has led to, held against the whole model; chosen once more."""

from __future__ import annotations

import types
from typing import Any

import pytest

from onnx_lowrank import guard, planning, wholes
from onnx_lowrank.allocate import Candidate, Choices, predicted_ms
from onnx_lowrank.plan import Decision
from onnx_lowrank.repair import Repaired

MILD, FAST = Candidate("svd", 16, 0.01, 8.0, 0.01), Candidate("svd", 8, 0.1, 2.0, 0.1)
CHOICE = Choices(Decision("a", "MatMul", (32, 32), ms_before=40.0), (FAST, MILD), (FAST, MILD))
WHOLE = 50.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One site of 40 ms in a model of 50; inside it, what the site becomes takes three times as long as alone."""
    inside = {None: 40.0, MILD.rank: 24.0, FAST.rank: 6.0}
    monkeypatch.setattr(wholes, "whole_key", lambda _: "whole")
    monkeypatch.setattr(
        wholes, "whole", lambda _, plan: {"before": WHOLE, "after": WHOLE - 40.0 + inside[plan[0].rank]}
    )
    monkeypatch.setattr(wholes, "predicted", lambda _, plan: WHOLE - predicted_ms(plan))
    monkeypatch.setattr(wholes, "factors", lambda *_: {"a": (1.0, 3.0)})
    table = types.SimpleNamespace(given=False, recall=lambda _, make: make())
    return types.SimpleNamespace(additivity={"corrected_sites": 0}, table=table)


def repaired(*decisions: Decision) -> Repaired:
    return Repaired(decisions, (), {}, 0.01, made_for=(CHOICE.become(MILD),))


def test_a_plan_that_is_off_is_corrected_and_stays_where_nothing_else_holds(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_further", lambda *_: None)
    choices = [CHOICE]
    one = planning._additive_again(run, choices, repaired(CHOICE.become(MILD)))
    assert [(d.rank, d.ms_before, d.ms_after) for d in one.decisions] == [(16, 40.0, 24.0)]
    assert one.made_for == one.decisions
    assert [c.ms for c in choices[0].candidates] == [6.0, 24.0]
    assert run.additivity == {"before_ms": 50.0, "predicted_ms": 34.0, "measured_ms": 34.0, "corrected_sites": 1}


def test_a_plan_that_is_faster_by_the_corrected_times_is_taken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_further", lambda _, choices, __: (choices[0].become(choices[0].candidates[0]),))
    (taken,) = planning._additive_again(run, [CHOICE], repaired(CHOICE.become(MILD))).decisions
    assert (taken.rank, taken.ms_after) == (8, 6.0)
    assert run.additivity["predicted_ms"] == run.additivity["measured_ms"] == 16.0


def test_a_slower_one_is_not(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_further", lambda _, choices, __: (choices[0].become(choices[0].candidates[1]),))
    (kept,) = planning._additive_again(run, [CHOICE], repaired(CHOICE.become(FAST))).decisions
    assert (kept.rank, kept.ms_after) == (8, 6.0)


def test_a_plan_that_fits_is_left_as_it_is(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wholes, "predicted", lambda *_: 31.0)  # within a tenth of 34
    run.additivity = {"corrected_sites": 3}
    choices = [CHOICE]
    one = repaired(CHOICE.become(MILD))
    assert planning._additive_again(run, choices, one) == one
    assert choices == [CHOICE]
    assert run.additivity["corrected_sites"] == 3


def test_what_a_plan_loses_elsewhere_is_charged_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by more than a tenth before the correction and after it: two profiles, one charge."""
    monkeypatch.setattr(guard, "losses", lambda *_: guard.Losses(ms={"a": 1.0}))
    monkeypatch.setattr(planning, "_reach", lambda _, choices: (choices[0].become(choices[0].candidates[-1]),))
    monkeypatch.setattr(wholes, "predicted", lambda *_: 1.0)
    choices = [CHOICE]
    (decision,) = planning._additive(run, choices, (CHOICE.become(MILD),))
    assert (decision.rank, decision.ms_after) == (16, 3 * 8.0 + 1.0)
    assert run.additivity["corrected_sites"] == 1


def test_times_that_are_still_off_are_corrected_once_more(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "losses", lambda *_: guard.Losses())
    monkeypatch.setattr(planning, "_reach", lambda _, choices: (choices[0].become(choices[0].candidates[0]),))
    monkeypatch.setattr(wholes, "factors", lambda *_: {"a": (1.0, 1.5)})
    monkeypatch.setattr(wholes, "predicted", lambda *_: 1.0)
    choices = [CHOICE]
    (decision,) = planning._additive(run, choices, (CHOICE.become(FAST),))
    assert decision.ms_after == pytest.approx(2.0 * 1.5**2)
