"""The knapsack against brute force, the frontier against its own definition."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.allocate import Candidate, Choices, frontier, predicted_loss, predicted_ms
from onnx_lowrank.knapsack import settle
from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Why


def site(name: str, dense_ms: float, options: list[tuple[float, float]]) -> Choices:
    """A site with candidates of (ms, loss); ranks count up."""
    candidates = tuple(
        Candidate("svd", rank + 1, 0.01, ms, loss, macs=int(1000 * ms), weights=int(100 * ms))
        for rank, (ms, loss) in enumerate(options)
    )
    dense = Decision(name, "MatMul", (64, 64), ms_before=dense_ms)
    return Choices(dense, candidates, candidates, macs=int(1000 * dense_ms), weights=int(100 * dense_ms))


def total_ms(sites: list[Choices], decisions: tuple[Decision, ...]) -> float:
    return sum(c.cost("ms") for c in sites) - predicted_ms(decisions)


options = st.lists(st.tuples(st.floats(0.1, 0.95), st.floats(0.001, 1.0)), min_size=0, max_size=4)
problems = st.lists(st.tuples(st.floats(1.0, 3.0), options), min_size=1, max_size=4).map(
    lambda rows: [site(f"s{i}", ms, opts) for i, (ms, opts) in enumerate(rows)]
)


def brute(sites: list[Choices], limit: float) -> float:
    """Least milliseconds of all plans whose loss is within the limit."""
    best = np.inf
    for chosen in itertools.product(*[(None, *c.candidates) for c in sites]):
        loss = sum(k.loss for k in chosen if k)
        ms = sum(k.ms if k else c.cost("ms") for c, k in zip(sites, chosen, strict=True))
        if loss <= limit:
            best = min(best, ms)
    return float(best)


@given(problems, st.floats(0.0, 2.0))
def test_one_target_is_the_best_of_all_plans(sites: list[Choices], limit: float) -> None:
    found = settle(sites, least="ms", limited="loss", limit=limit)
    assert found is not None  # all dense has no loss
    assert predicted_loss(found) <= limit + 1e-6
    assert total_ms(sites, found) <= brute(sites, limit) * 1.002 + 1e-6


@given(problems)
def test_every_plan_of_the_frontier_is_the_best_within_its_loss(sites: list[Choices]) -> None:
    for loss, decisions in frontier(sites):
        assert loss == pytest.approx(predicted_loss(decisions))
        assert total_ms(sites, decisions) <= brute(sites, loss * (1 + 1e-9) + 1e-12) + 1e-9


@given(problems)
def test_the_frontier_goes_from_mild_to_fast(sites: list[Choices]) -> None:
    plans = frontier(sites)
    losses = [loss for loss, _ in plans]
    times = [total_ms(sites, decisions) for _, decisions in plans]
    assert losses == sorted(losses)
    assert times == sorted(times, reverse=True)
    if plans:  # its end is the fastest plan there is
        fastest = sum(min([c.cost("ms"), *(k.ms for k in c.candidates)]) for c in sites)
        assert times[-1] == pytest.approx(fastest)


def test_a_target_that_no_plan_reaches_is_none() -> None:
    assert settle([site("a", 1.0, [(0.5, 0.1)])], least="loss", limited="weights", limit=10.0) is None


def test_a_size_is_reached_with_the_least_loss() -> None:
    sites = [site("a", 1.0, [(0.5, 0.3), (0.2, 0.4)]), site("b", 1.0, [(0.5, 0.1), (0.2, 0.9)])]
    found = settle(sites, least="loss", limited="weights", limit=150)
    assert found is not None
    assert [(d.node, d.rank) for d in found] == [("a", None), ("b", 1)]


def test_dense_keeps_its_reason() -> None:
    nothing, slow = site("a", 1.0, []), site("b", 1.0, [(0.5, 0.1)])
    small = Choices(nothing.dense.keep(Why.TOO_SMALL), ())
    assert [c.stay().why for c in (nothing, slow, small)] == [Why.NOT_FASTER, Why.LOSS, Why.TOO_SMALL]


def test_the_frontier_can_be_one_of_multiply_adds() -> None:
    sites = [site("a", 1.0, [(0.5, 0.3)])]
    assert [d[0].rank for _, d in frontier(sites, "macs")] == [1]


def layered(sites: list[Choices], first: int, second: int, widths: list[tuple[float, float, float]]) -> list[Choices]:
    """The same sites, two of them with the halves of a layer: (share of the first's time, of the second's, loss)."""
    found = list(sites)
    for index, other, producer in ((first, second, True), (second, first, False)):
        choice, dense = sites[index], sites[index].cost("ms")
        more = tuple(
            Candidate("nystrom", rank + 1, 0.0 if producer else loss, dense * (one if producer else two),
                      0.0 if producer else loss, partner=sites[other].dense.node)
            for rank, (one, two, loss) in enumerate(widths)
        )  # fmt: skip
        found[index] = dataclasses.replace(choice, candidates=(*choice.candidates, *more))
    return found


def shared(sites: list[Choices], sets: list[tuple[int, ...]], ranks: list[tuple[float, float]]) -> list[Choices]:
    """The same sites, sets of them with a common factor: (share of the time, loss of each) by rank."""
    found = list(sites)
    for members in sets:
        names = tuple(sites[i].dense.node for i in members)
        for index in members:
            more = tuple(
                Candidate("shared", rank + len(members), loss, sites[index].cost("ms") * part, loss, sharers=names)
                for rank, (part, loss) in enumerate(ranks)
            )
            found[index] = dataclasses.replace(found[index], candidates=(*found[index].candidates, *more))
    return found


shares = st.lists(st.tuples(st.floats(0.1, 0.95), st.floats(0.1, 0.95), st.floats(0.001, 1.0)), min_size=1, max_size=3)
paired = st.tuples(problems.filter(lambda sites: len(sites) > 1), shares).map(
    lambda drawn: layered(drawn[0], 0, len(drawn[0]) - 1, drawn[1])
)


parts = st.lists(st.tuples(st.floats(0.1, 0.95), st.floats(0.001, 0.5)), min_size=1, max_size=2)
families = st.tuples(problems.filter(lambda sites: len(sites) > 2), parts).map(
    lambda drawn: shared(drawn[0], [(0, 1, 2), (0, 1), (0, 2), (1, 2)], drawn[1])
)


def whole(decisions: tuple[Decision, ...]) -> bool:
    """Whether every half of a layer has its other half, at the same width."""
    by_name = {d.node: d for d in decisions}
    halves = [(d, by_name[d.partner]) for d in decisions if d.partner]
    sharing = [(d, by_name[name]) for d in decisions for name in d.sharers]
    if not all((d.kind, d.rank, d.sharers) == (other.kind, other.rank, other.sharers) for d, other in sharing):
        return False
    return all((d.kind, d.rank, d.node) == (other.kind, other.rank, other.partner) for d, other in halves)


def brute_paired(sites: list[Choices], limit: float) -> float:
    best = np.inf
    for chosen in itertools.product(*[(None, *c.candidates) for c in sites]):
        decisions = tuple(c.become(k) if k else c.stay() for c, k in zip(sites, chosen, strict=True))
        if whole(decisions) and predicted_loss(decisions) <= limit:
            best = min(best, total_ms(sites, decisions))
    return float(best)


@given(st.one_of(paired, families), st.floats(0.0, 2.0))
def test_what_goes_together_is_chosen_together_or_not_at_all(sites: list[Choices], limit: float) -> None:
    found = settle(sites, least="ms", limited="loss", limit=limit)
    assert found is not None
    assert whole(found)
    assert predicted_loss(found) <= limit + 1e-6
    assert total_ms(sites, found) <= brute_paired(sites, limit) * 1.002 + 1e-6


@given(st.one_of(paired, families))
def test_the_frontier_is_best_with_layers_and_common_factors_too(sites: list[Choices]) -> None:
    plans = frontier(sites)
    for loss, decisions in plans:
        assert whole(decisions)
        assert loss == pytest.approx(predicted_loss(decisions))
        assert total_ms(sites, decisions) <= brute_paired(sites, loss * (1 + 1e-9) + 1e-12) + 1e-9


def test_a_layer_takes_the_place_of_what_its_sites_had_become() -> None:
    sites = layered([site("a", 1.0, [(0.9, 0.001)]), site("b", 1.0, [])], 0, 1, [(0.3, 0.3, 0.1)])
    (_, mild), (_, far) = frontier(sites)
    assert [(d.kind, d.rank) for d in mild] == [("svd", 1), (None, None)]
    assert [(d.kind, d.rank, d.partner) for d in far] == [("nystrom", 1, "b"), ("nystrom", 1, "a")]


def test_a_common_factor_takes_the_place_of_what_its_sites_had_become() -> None:
    sites = shared([site("a", 1.0, [(0.9, 0.001)]), site("b", 1.0, []), site("c", 1.0, [])], [(0, 2)], [(0.5, 0.1)])
    (_, mild), (_, far) = frontier(sites)
    assert [(d.kind, d.rank) for d in mild] == [("svd", 1), (None, None), (None, None)]
    assert [(d.kind, d.rank, d.sharers) for d in far] == [
        ("shared", 2, ("a", "c")),
        (None, None, ()),
        ("shared", 2, ("a", "c")),
    ]


def test_a_set_that_not_all_of_its_sites_offer_is_not_chosen() -> None:
    all_three = shared([site(name, 1.0, []) for name in "abc"], [(0, 1, 2)], [(0.5, 0.1)])
    sites = [*all_three[:2], dataclasses.replace(all_three[2], candidates=())]
    assert frontier(sites) == []
    found = settle(sites, least="ms", limited="loss", limit=1.0)
    assert found is not None
    assert not any(d.kind for d in found)


def test_a_half_without_its_other_half_is_not_chosen() -> None:
    both = layered([site("a", 1.0, []), site("b", 1.0, [])], 0, 1, [(0.3, 0.3, 0.1)])
    sites = [both[0], dataclasses.replace(both[1], candidates=())]
    assert frontier(sites) == []
    found = settle(sites, least="ms", limited="loss", limit=1.0)
    assert found is not None
    assert not any(d.kind for d in found)


@pytest.mark.skipif(os.name != "posix", reason="prints by the C library of POSIX systems")
def test_what_the_solver_prints_does_not_reach_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    milp = scipy.optimize.milp

    def talking(*given: Any, **named: Any) -> Any:
        ctypes.CDLL(None).printf(b"buffered ")
        os.write(1, b"direct ")
        return milp(*given, **named)

    monkeypatch.setattr(scipy.optimize, "milp", talking)
    ctypes.CDLL(None).printf(b"before ")
    assert settle([site("a", 1.0, [(0.5, 0.3)])], least="ms", limited="loss", limit=0.5)
    print("after", flush=True)
    assert capfd.readouterr().out == "before after\n"
