"""The plan file: everything comes back as it was, and nothing else is taken for a plan."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.plan import Decision, Plan, Refit
from onnx_lowrank.sites import Why

PLAN = Plan(
    model_sha256="ab" * 32,
    decisions=(
        Decision("a", "MatMul", (8, 4), "svd", 2, None, 1.0, 0.5, 0.01, 0.002),
        Decision("b", "Conv", (16, 36), None, None, Why.LOSS, 2.0, 2.0),
        Decision("c", "Conv", (16, 36), "spatial", 3, None, 2.0, 1.0, 0.02, 0.001),
    ),
    max_loss=0.01,
    provider="cpu",
    threads=1,
    seed=3,
    samples=64,
    data=("x.npz",),
    shapes=((("x", (1, 3, 8, 8)),), (("x", (2, 3, 8, 8)),)),
    metric="cosine",
    output_weights=(("y", 2.0), ("z", 0.5)),
    refits=(
        Refit((("a", "svd", 3, 0), ("c", "tucker", 3, 2)), ("a",)),
        Refit((("a", "svd", 2, 0),), ("a",), (("a", 1, 0),)),
    ),
)


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **fields})


def site(**fields: Any) -> str:
    row = json.loads(PLAN.to_json())["decisions"][0]
    return changed(decisions=[{**row, **fields}])


def test_a_plan_comes_back_as_it_was() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    free = dataclasses.replace(PLAN, max_loss=None, shapes=(), data=())
    assert Plan.from_json(free.to_json()) == free


def test_what_changes_is_what_has_a_kind() -> None:
    assert [d.node for d in PLAN.rewritten] == ["a", "c"]


def test_giving_back_keeps_the_others_and_says_why() -> None:
    given = PLAN.giving_back(["a", "b"])
    assert given.decisions[1:] == PLAN.decisions[1:]  # b was dense before, for its own reason
    assert given.decisions[0].why is Why.GIVEN_BACK
    assert (given.decisions[0].kind, given.decisions[0].rank, given.decisions[0].ms_after) == (None, None, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        changed(schema=99),
        changed(model_sha256="x", unknown=1),
        json.dumps({k: v for k, v in json.loads(PLAN.to_json()).items() if k != "seed"}),
        site(why="NO_SUCH_REASON"),
        site(kind=None),
        site(rank=0),
        site(rank="8"),
        site(extra=1),
        changed(shapes=3),
        changed(refits=[{"kept": []}]),
        changed(refits=[{"kept": [], "near": [], "ranks": [["a", "svd", "many", 0]]}]),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Plan.from_json(text, "p.json")
    assert str(caught.value).startswith("p.json: ")
    assert "\n" not in str(caught.value)


def test_both_sites_of_a_layer_are_given_back_together() -> None:
    layer = [
        Decision("up", "MatMul", (8, 4), "nystrom", 6, partner="down"),
        Decision("down", "MatMul", (4, 8), "nystrom", 6, partner="up"),
        Decision("other", "MatMul", (8, 8), "svd", 2),
    ]
    for node in ("up", "down"):
        plan = dataclasses.replace(PLAN, decisions=tuple(layer)).giving_back([node])
        assert [(d.kind, d.partner) for d in plan.decisions] == [(None, None), (None, None), ("svd", None)]
