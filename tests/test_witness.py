"""A plan that the held-out samples let pass, held against all samples; a milder one where they deny it."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import run as runs
from onnx_lowrank import witness
from onnx_lowrank.allocate import Candidate, Choices, predicted_loss
from onnx_lowrank.metrics import RelativeLoss
from onnx_lowrank.plan import Decision, Refit
from onnx_lowrank.repair import Decisions, Repaired
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References

MILD, MIDDLE, FAST = (
    Candidate("svd", rank, loss, ms, loss) for rank, loss, ms in ((16, 0.01, 8.0), (12, 0.05, 4.0), (8, 0.1, 2.0))
)
CHOICE = Choices(Decision("a", "MatMul", (32, 32), ms_before=40.0), (FAST, MIDDLE, MILD), (FAST, MIDDLE, MILD))
RAW: Any = {"a": "fitted to the original"}
MADE: Any = {"a": "repaired"}


@dataclasses.dataclass
class Samples:
    """What of a run is read; `loss_of_all` depends on the factors, as after a repair."""

    lost: Callable[[Mapping[str, Any], Decisions], float]
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(max_loss=0.05))
    fits: Any = dataclasses.field(default_factory=dict)
    loaded: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(shared=False, sites=()))
    base_loss: float = 0.0
    warnings: list[str] = dataclasses.field(default_factory=list)

    def loss_of_all(self, plan: Decisions) -> float:
        return self.lost(self.fits, plan)


@pytest.fixture(autouse=True)
def all_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "served", lambda choices, *_: list(choices))


def plan(candidate: Candidate | None) -> Decisions:
    return (CHOICE.become(candidate) if candidate else CHOICE.stay(),)


def factors(candidate: Candidate, made_for: Candidate | None = None) -> Repaired:
    """A plan, with factors that were repaired for another one where that is given."""
    if made_for is None:
        return Repaired(plan(candidate), (), RAW)
    return Repaired(plan(candidate), (Refit.of(plan(made_for), ["a"]),), MADE, made_for=plan(made_for))


def thrice(_: Mapping[str, Any], decisions: Decisions) -> float:
    return 3 * predicted_loss(decisions)


def held(run: Samples, first: Repaired, found: Repaired, choices: Choices = CHOICE) -> Repaired:
    return witness.held_by_all(run, [choices], first, found)  # type: ignore[arg-type]


def test_a_plan_that_all_samples_deny_makes_way_for_a_milder_one() -> None:
    run, one = Samples(thrice), factors(FAST)
    assert held(run, one, one) == factors(MILD)
    assert len(run.warnings) == 1


def test_and_for_the_original_where_none_is_mild_enough() -> None:
    run, one = Samples(thrice, Settings(max_loss=0.02)), factors(FAST)
    assert held(run, one, one) == dataclasses.replace(one, decisions=plan(None))


def test_what_a_repair_was_spent_on_is_taken_back_as_far_as_the_plan_that_it_was_made_for() -> None:
    def lost(fits: Mapping[str, Any], decisions: Decisions) -> float:
        return {8: 0.08, 12: 0.03, 16: 0.4}[decisions[0].rank or 0] if fits is MADE else 1.0

    found = held(Samples(lost), factors(MIDDLE), factors(FAST, made_for=MIDDLE))
    assert found == dataclasses.replace(factors(FAST, made_for=MIDDLE), decisions=plan(MIDDLE))


def test_a_plan_that_is_milder_than_that_has_factors_of_the_original_again() -> None:
    def lost(fits: Mapping[str, Any], decisions: Decisions) -> float:
        return {8: 0.4, 12: 0.3, 16: 0.4}[decisions[0].rank or 0] if fits is MADE else predicted_loss(decisions)

    run = Samples(lost, Settings(max_loss=0.02))
    assert held(run, factors(MIDDLE), factors(FAST, made_for=MIDDLE)) == factors(MILD)


def test_a_repair_that_was_not_spent_gives_way_to_the_same_plan_without_it() -> None:
    """The first plan is tried though the frontier does not have it: it was polished."""

    def lost(fits: Mapping[str, Any], decisions: Decisions) -> float:
        return 1.0 if fits is MADE else predicted_loss(decisions)

    polished = dataclasses.replace(MIDDLE, loss=0.049, rank=11)
    assert held(Samples(lost), factors(polished), factors(polished, made_for=polished)) == factors(polished)


def test_a_plan_that_was_said_to_lose_nothing_is_denied_too() -> None:
    free = dataclasses.replace(MILD, loss=0.0)
    one = factors(free)
    found = held(Samples(lambda *_: 0.1), one, one, dataclasses.replace(CHOICE, candidates=(free,)))
    assert found.decisions == plan(None)


@pytest.mark.parametrize("choices", [{"max_loss": 0.4}, {"max_loss": 0.05, "confidence": 0.5}, {"speedup": 2.0}])
def test_a_plan_that_holds_or_need_not_is_left(choices: dict[str, Any]) -> None:
    run, one = Samples(thrice, Settings(**choices)), factors(FAST)
    assert held(run, one, one) is one
    assert not run.warnings


@pytest.mark.parametrize(("kept", "sessions"), [(2**30, 1), (0, 2)])
def test_outputs_of_the_original_are_kept_where_they_take_little(
    kept: int, sessions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) {y = Neg(x)}'
    )
    onnx.save(model, tmp_path / "model.onnx")
    samples = [{"x": np.full(2, i, np.float32)} for i in range(4)]
    references = References(Session(model), samples[:1], RelativeLoss)
    opened: list[Path] = []
    monkeypatch.setattr(runs, "_KEPT", kept)

    def opening(path: Path, **choices: Any) -> Session:
        opened.append(path)
        return Session(path, **choices)

    monkeypatch.setattr(runs, "Session", opening)
    loaded: Any = types.SimpleNamespace(
        file=types.SimpleNamespace(path=tmp_path / "model.onnx"), calibration=samples[1:]
    )
    witnesses = runs._witnesses(loaded, Settings(), references)
    assert not opened
    for _ in range(2):
        for (feed, (output,)), sample in zip(witnesses(), samples[1:], strict=True):
            assert feed == sample
            np.testing.assert_array_equal(output, -sample["x"])
    assert len(opened) == sessions
