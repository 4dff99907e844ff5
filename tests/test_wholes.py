"""Whole models against the sum of their sites: paces, corrections, and what is told of a plan."""

from __future__ import annotations

import types
from typing import Any

import pytest

from onnx_lowrank import insitu, wholes
from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.plan import Decision

HALF = Candidate("svd", 8, 0.1, 20.0, 0.1)
SITES = tuple(Choices(Decision(node, "MatMul", (32, 32), ms_before=40.0), (HALF,), (HALF,)) for node in "ab")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two sites of 40 ms by the table, on a machine that takes 1.6 times as long by now; `a` gains only a quarter."""
    times = {"before": 160.0, "after": 144.0}
    shares: dict[bool, dict[str, float]] = {False: {"a": 64 / 160, "b": 64 / 160}, True: {"a": 48 / 144, "b": 64 / 144}}
    monkeypatch.setattr(wholes, "whole", lambda *_: times)
    monkeypatch.setattr(wholes, "digest", lambda _, plan: str(any(d.kind for d in plan)))
    monkeypatch.setattr(wholes, "whole_key", lambda _: "whole")
    table = types.SimpleNamespace(recall=lambda key, make: shares[key.endswith("True")] if "shares" in key else make())
    return types.SimpleNamespace(table=table, settings=types.SimpleNamespace(provider="cpu"))


def test_a_correction_is_at_the_pace_of_the_table(run: Any) -> None:
    plan = (SITES[0].become(HALF), SITES[1].stay())
    known = wholes.factors(run, plan)
    assert list(known) == ["a"]
    assert known["a"] == pytest.approx((1.0, 1.5))
    assert wholes.predicted(run, insitu.retimed(plan, known)) == pytest.approx(144.0)


def test_what_is_told_of_a_plan(run: Any) -> None:
    plan = (SITES[0].become(HALF), SITES[1].stay())
    told = wholes.additivity(run, plan, 3)
    assert told == {
        "before_ms": 160.0,
        "predicted_ms": pytest.approx(128.0),
        "measured_ms": 144.0,
        "corrected_sites": 3,
    }


def test_nothing_is_told_where_nothing_was_chosen(run: Any) -> None:
    assert wholes.additivity(run, tuple(site.stay() for site in SITES)) == {}
