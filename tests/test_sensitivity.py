"""A few probes a site: the curve from local error to output loss, and where a straight line does not hold."""

from __future__ import annotations

import pytest

from onnx_lowrank.sensitivity import Response, floored, probe_ranks, responses

ERRORS = {8: 0.3, 16: 0.08, 24: 0.03, 32: 0.01, 64: 0.001}


def test_a_linear_model_of_the_loss_is_recovered_exactly() -> None:
    probed: list[tuple[str, int]] = []

    def loss_of(node: str, rank: int) -> float:
        probed.append((node, rank))
        return {"a": 0.5, "b": 3.0}[node] * ERRORS[rank]

    found = responses([("a", ERRORS), ("b", ERRORS)], loss_of, lambda *_: None)
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

    response = responses([("a", ERRORS)], loss_of, lambda *_: None)["a"]
    assert probed == [16, 32, 24]
    assert not response.linear
    assert response.loss(0.03) == pytest.approx(0.03**2)


def test_one_probe_is_enough_where_no_more_are_asked_for() -> None:
    assert probe_ranks(ERRORS, 1) == (24,)  # nearest to the middle of the targets


def test_a_site_whose_ranks_are_all_exact_is_not_probed() -> None:
    assert probe_ranks({4: 0.0}, 2) == ()
    assert responses([("a", {4: 0.0})], lambda *_: 1.0, lambda *_: None) == {}


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
