"""A few probes a site: the curve from local error to output loss, and where a straight line does not hold."""

from __future__ import annotations

import pytest

from onnx_lowrank.sensitivity import Response, floored, probe_ranks, responses, spare_probes

ERRORS = {8: 0.3, 16: 0.08, 24: 0.03, 32: 0.01, 64: 0.001}


def test_a_linear_model_of_the_loss_is_recovered_exactly() -> None:
    probed: list[tuple[str, int]] = []

    def loss_of(node: str, rank: int) -> float:
        probed.append((node, rank))
        return {"a": 0.5, "b": 3.0}[node] * ERRORS[rank]

    found = responses([("a", ERRORS), ("b", ERRORS)], loss_of, lambda *_: None, spare=4)
    for node, slope in (("a", 0.5), ("b", 3.0)):
        assert found[node].linear
        for error in (0.0, 0.002, 0.01, 0.05, 0.4):
            assert found[node].loss(error) == pytest.approx(slope * error)
    assert probed == [("a", 16), ("a", 32), ("b", 16), ("b", 32)]  # no third probe where a line holds


def test_where_a_line_does_not_hold_a_third_probe_lies_between() -> None:
    probed: list[int] = []

    def loss_of(node: str, rank: int) -> float:
        del node
        probed.append(rank)
        return ERRORS[rank] ** 2

    response = responses([("a", ERRORS)], loss_of, lambda *_: None, spare=4)["a"]
    assert probed == [16, 32, 24]
    assert not response.linear
    assert response.loss(0.03) == pytest.approx(0.03**2)


@pytest.mark.parametrize(
    ("sites", "curves", "most", "spare"),
    [
        (26, 30, 60, 60),  # a second for every site: a third, too, wherever it is wanted
        (26, 30, 52, 60),
        (26, 30, 37, 7),  # one for each curve, and what is left
        (26, 30, 20, 0),  # one each, whatever it costs
    ],
)
def test_probes_beyond_the_first_are_what_the_budget_leaves(sites: int, curves: int, most: int, spare: int) -> None:
    assert spare_probes(sites, curves, most) == spare


@pytest.mark.parametrize(
    ("spare", "points", "checked"),
    [(0, [1, 1, 1], 0), (1, [2, 1, 1], 1), (2, [3, 1, 1], 1), (3, [3, 2, 1], 2), (4, [3, 2, 2], 3), (6, [3, 2, 2], 3)],
)
def test_spare_probes_go_to_the_first_curves(spare: int, points: list[int], checked: int) -> None:
    """The first is no line and takes a third, the others are."""
    probed: list[str] = []

    def loss_of(node: str, rank: int) -> float:
        probed.append(node)
        return ERRORS[rank] ** (2 if node == "a" else 1)

    found = responses([(name, ERRORS) for name in "abc"], loss_of, lambda *_: None, spare=spare)
    assert [probed.count(name) for name in "abc"] == points
    assert sum(response.checked for response in found.values()) == checked
    assert [name for name, response in found.items() if not response.linear] == (["a"] if checked else [])


def test_one_probe_is_enough_where_no_more_are_asked_for() -> None:
    assert probe_ranks(ERRORS, 1) == (24,)  # nearest to the middle of the targets


def test_a_site_whose_ranks_are_all_exact_is_not_probed() -> None:
    assert probe_ranks({4: 0.0}, 2) == ()
    assert responses([("a", {4: 0.0})], lambda *_: 1.0, lambda *_: None, spare=2) == {}


def test_the_curve_goes_on_as_it_ends_and_starts_at_nothing() -> None:
    response = Response(((0.01, 0.001), (0.1, 0.02)))
    assert response.loss(0.0) == 0.0
    assert response.loss(0.005) == pytest.approx(0.0005)
    assert response.loss(0.2) == pytest.approx(0.04)


def test_a_site_that_looks_free_is_not_believed() -> None:
    found = floored({name: Response(((0.01, slope * 0.01),)) for name, slope in (("a", 1.0), ("b", 2.0), ("c", 0.0))})
    assert [found[name].loss(0.1) for name in "abc"] == pytest.approx([0.1, 0.2, 1e-4])
    assert floored({}) == {}
    assert floored({"a": Response(((0.0, 0.0),))}) == {"a": Response(((0.0, 0.0),))}
