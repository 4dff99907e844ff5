"""An estimate that a built plan proves wrong is raised, so that one bad site cannot spoil every plan."""

from __future__ import annotations

import pytest

from onnx_lowrank.allocate import Candidate, Choices, frontier
from onnx_lowrank.blame import explained
from onnx_lowrank.plan import Decision
from onnx_lowrank.search import Found, search


def site(name: str, losses: dict[int, float], partner: str | None = None) -> Choices:
    """A site whose candidates have an error of a hundredth for each rank that is missing to 10."""
    kind = "svd" if partner is None else "nystrom"
    candidates = tuple(
        Candidate(kind, rank, (10 - rank) / 100, rank / 20, loss, partner=partner) for rank, loss in losses.items()
    )
    return Choices(Decision(name, "MatMul", (64, 64), ms_before=1.0), candidates)


def truth(decisions: tuple[Decision, ...]) -> float:
    """The site `bad` loses a tenth where it is changed at all; the others what was predicted."""
    return sum(0.1 if d.node == "bad" and d.kind else d.loss or 0.0 for d in decisions)


def test_a_site_that_looks_free_and_is_not_no_longer_spoils_every_plan() -> None:
    choices = [site("bad", {8: 1e-9}), site("good", {8: 0.002, 6: 0.004})]
    found = search(frontier(choices), truth, 0.01)
    assert found.holds is None  # the bad site is in every plan
    raised = explained(choices, found, 0.01)
    assert raised is not None
    assert raised[0].candidates[0].loss == pytest.approx(0.1)
    assert raised[1] == choices[1]
    again = search(frontier(raised), truth, 0.01)
    assert again.holds is not None
    assert [(d.kind, d.rank) for d in again.holds] == [(None, None), ("svd", 6)]
    assert explained(raised, again, 0.01) is None


def test_other_ranks_lose_in_proportion_to_their_error() -> None:
    choices = [site("bad", {9: 1e-9, 8: 2e-9, 5: 0.9})]
    bold = (choices[0].become(choices[0].candidates[1]),)
    raised = explained(choices, Found(None, 0.0, bold, 0.1), 0.01)
    assert raised is not None
    assert [c.loss for c in raised[0].candidates] == pytest.approx([0.05, 0.1, 0.9])


def test_of_a_layer_the_half_with_the_error_is_blamed_and_only_as_a_layer() -> None:
    first, second = site("first", {8: 0.0}, "bad"), site("bad", {8: 1e-9}, "first")
    free = tuple(Candidate(c.kind, c.rank, 0.0, c.ms, 0.0, partner="bad") for c in first.candidates)
    alone = Candidate("svd", 8, 0.02, 0.4, 1e-3)
    choices = [Choices(first.dense, free), Choices(second.dense, (*second.candidates, alone))]
    bold = tuple(c.become(c.candidates[0]) for c in choices)
    raised = explained(choices, Found(None, 0.0, bold, 0.1), 0.01)
    assert raised is not None
    assert raised[0] == choices[0]
    assert [c.loss for c in raised[1].candidates] == pytest.approx([0.1, 1e-3])


@pytest.mark.parametrize(
    ("value", "over"),
    [
        (0.006, 0.1),  # the plan that holds is near enough
        (0.0, 0.015),  # the estimate was right: the step is large
    ],
)
def test_what_was_predicted_well_stays(value: float, over: float) -> None:
    choices = [site("a", {8: 0.012})]
    bold = (choices[0].become(choices[0].candidates[0]),)
    assert explained(choices, Found(None, value, bold, over), 0.01) is None


def test_an_infinite_loss_counts_as_one() -> None:
    choices = [site("bad", {8: 1e-9})]
    bold = (choices[0].become(choices[0].candidates[0]),)
    raised = explained(choices, Found(None, 0.0, bold, float("inf")), 0.01)
    assert raised is not None
    assert raised[0].candidates[0].loss == pytest.approx(1.0)


def test_a_plan_without_any_error_cannot_be_blamed() -> None:
    choices = [Choices(Decision("a", "MatMul", (4, 4), ms_before=1.0), (Candidate("svd", 2, 0.0, 0.5, 0.0),))]
    bold = (choices[0].become(choices[0].candidates[0]),)
    assert explained(choices, Found(None, 0.0, bold, 0.5), 0.01) is None
