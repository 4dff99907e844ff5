"""Which sites may share their first factor, and every reason why not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnx_lowrank.families import Apart, common, families, family_of, sets
from onnx_lowrank.sites import Geometry, Site

MATMUL = Geometry("MatMul", 12, 20, "float32", True, 17, x_shape=(3, 40, 20))
CONV = Geometry(
    "Conv", 10, 54, "float32", True, 17, channels=6, kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1,) * 4,
)  # fmt: skip


def site(name: str, geometry: Geometry = MATMUL, x: str = "x") -> Site:
    weight = np.zeros((geometry.outputs, 1), np.float32)
    return Site(name, geometry, weight, np.zeros(geometry.outputs), x, f"{name}.y", (hash(name) % 1000,))


def tied(name: str) -> Site:
    return dataclasses.replace(site(name), twins=(site(f"{name}2", x="z"),))


def within(name: str, branch: str) -> Site:
    return dataclasses.replace(site(name), branch=branch)


def changed(**fields: object) -> Geometry:
    return dataclasses.replace(MATMUL, **fields)  # type: ignore[arg-type]


def test_sites_that_read_one_tensor_alike_are_a_family_in_their_order() -> None:
    sites = [site("q"), site("other", x="z"), site("k", changed(outputs=7)), site("conv", CONV, "z"), site("v")]
    assert [[one.name for one in family] for family in families(sites)] == [["q", "k", "v"]]
    assert family_of(sites[4], sites) == (sites[0], sites[2], sites[4])


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (site("a"), site("b", x="z"), Apart.ALONE),
        (tied("a"), site("b"), Apart.TIED),
        (site("a"), tied("b"), Apart.ALONE),
        (site("a"), within("b", "If"), Apart.BRANCH),
        (within("a", "one"), within("b", "two"), Apart.BRANCH),
        (site("a"), site("b", changed(bias=False)), Apart.LAYOUT),
        (site("a"), site("b", changed(op="Gemm", trans_a=True)), Apart.LAYOUT),
        (site("a", CONV), site("b", dataclasses.replace(CONV, strides=(2, 2))), Apart.LAYOUT),
        (site("a", CONV), site("b", dataclasses.replace(CONV, then="Relu")), Apart.LAYOUT),
        (site("a", dataclasses.replace(CONV, groups=2)), site("b", CONV), Apart.GROUPED),
        (site("a", changed(inputs=4000)), site("b", changed(inputs=4000)), Apart.WIDE),
    ],
    ids=[
        "alone",
        "tied",
        "another is tied",
        "branch",
        "branches",
        "bias",
        "operator",
        "strides",
        "activation",
        "grouped",
        "wide",
    ],
)
def test_what_is_no_family_says_why(one: Site, other: Site, why: Apart) -> None:
    assert family_of(one, [one, other]) is why
    assert families([one, other]) == ()


def test_families_of_one_tensor_are_told_by_what_they_have_in_common() -> None:
    sites = [site("a"), within("p", "If"), site("b"), site("c", changed(bias=False)), within("q", "If"),
             site("d", changed(bias=False))]  # fmt: skip
    found = families(sites)
    assert [[one.name for one in family] for family in found] == [["a", "b"], ["p", "q"], ["c", "d"]]
    assert len({common(one) for one in sites}) == len(found)


def test_any_two_sets_of_a_family_have_a_site_in_common() -> None:
    for count in (2, 3, 5):
        family = tuple(site(f"s{i}") for i in range(count))
        found = [{one.name for one in members} for members in sets(family)]
        assert found[0] == {one.name for one in family}
        assert len(found) == (1 if count == 2 else count + 1)
        assert all(a & b for a in found for b in found)
        assert all(len(members) > 1 for members in found)
