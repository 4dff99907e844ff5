"""One probe a site: the loss of the model per unit of the site's own error."""

from __future__ import annotations

import pytest

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.plan import Decision
from onnx_lowrank.sensitivity import sensitivities


def choices(node: str, errors: list[float]) -> Choices:
    candidates = tuple(Candidate("svd", 16 * (i + 1), e, 1.0, e) for i, e in enumerate(errors))
    return Choices(Decision(node, "MatMul", (64, 64), ms_before=2.0), candidates)


def test_a_linear_model_of_the_loss_is_recovered_exactly() -> None:
    truth = {"a": 0.5, "b": 3.0}
    given = [choices("a", [0.2, 0.011, 0.0001]), choices("b", [0.09, 0.02])]
    errors = {(c.dense.node, k.rank): k.error for c in given for k in c.candidates}
    probed: list[Decision] = []

    def loss_of(decision: Decision) -> float:
        probed.append(decision)
        assert decision.rank is not None
        return truth[decision.node] * errors[(decision.node, decision.rank)]

    assert sensitivities(given, loss_of, lambda *_: None) == pytest.approx(truth)
    assert [(d.node, d.rank) for d in probed] == [("a", 32), ("b", 32)]  # the errors nearest to 0.01


def test_a_site_without_candidates_costs_no_probe() -> None:
    def never(decision: Decision) -> float:
        raise AssertionError(decision)

    assert sensitivities([choices("a", [])], never, lambda *_: None) == {}
