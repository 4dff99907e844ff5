"""Neighbours multiplied by given tables: what is chosen takes no longer than the pairs, whatever a table says."""

from __future__ import annotations

import dataclasses
import itertools
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from onnx_lowrank import measure
from onnx_lowrank.graph import Graph
from onnx_lowrank.latency import write_table
from onnx_lowrank.merging import Merged, Pair, Read, merged, read, seen
from onnx_lowrank.passes.merge import MOST, Merge, merges
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site
from tests.passes.test_merge import Array, Builder, builders, image, matrix, run, same

Rows = Mapping[str, Mapping[str, float]]


def chain(*widths: int) -> Builder:
    """MatMuls n0, n1, … from the first width through all the others."""
    builder = Builder(matrix(5, widths[0]))
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        builder.node("MatMul", [f"t{i - 1}" if i else "x", (k, n)], f"t{i}")
    return builder


def key(*widths: int, rows: int = 5) -> str:
    """What a table calls the product of two MatMuls, for so many rows of a sample that has 5 in the first run."""
    k, m, n = widths
    one, two = (f"MatMul {b}x{a} float32 x=5x{a} bias=0 right" for a, b in ((k, m), (m, n)))
    return f"merge {one} {two} {n}x{k} float32 x={rows}x{k} bias=0 right"


def together(
    builder: Builder, folder: Path, rows: Rows, planned: list[Pair] | None = None, **choices: Any
) -> tuple[Read, tuple[Merged, ...]]:
    """What becomes of a model with a given table."""
    write_table(folder / "table.json", {"provider": "cpu", "threads": 1}, rows)
    feeds = [{"x": builder.x}]
    chosen = Settings(**{"cache": folder / "table.json", **choices})
    return merged(read(builder.file(), feeds), feeds, chosen, lambda *_: True, planned)


def pairs(done: tuple[Merged, ...]) -> list[Pair]:
    return [(one.taken_in, one.node) for one in done]


FAST, SLOW = {"pair": 2.0, "dense": 1.0}, {"pair": 1.0, "dense": 2.0}
CHEAP, DEAR, FAR = (32, 64, 32), (32, 12, 32), (32, 10, 32)
"""The product has a quarter, 1.33 times and 1.6 times the multiply-adds of the pair."""


@pytest.mark.parametrize(
    ("widths", "row", "one"),
    [
        (CHEAP, FAST, True),
        (CHEAP, SLOW, False),
        (CHEAP, {"pair": 1.0, "dense": 1.001}, False),
        (CHEAP, {"dense": 1.0}, True),  # not known: fewer multiply-adds
        (DEAR, FAST, True),
        (DEAR, SLOW, False),
        (DEAR, {"dense": 1.0}, False),
        (DEAR, {"pair": 1.05, "dense": 1.0, "dense again": 1.06}, False),  # no more than the noise
        (DEAR, {"pair": 1.05, "dense": 1.0, "dense again": 1.04}, True),
        (FAR, FAST, False),
    ],
)
def test_a_given_table_decides(widths: tuple[int, ...], row: dict[str, float], one: bool, tmp_path: Path) -> None:
    builder = chain(*widths)
    known, done = together(builder, tmp_path, {key(*widths): row})
    assert pairs(done) == ([("n0", "n1")] if one else [])
    assert same(run(builder.file().model, builder.x), run(known.file.model, builder.x), 200)
    if not one:
        assert known.file.model == builder.file().model


def test_a_dearer_product_must_be_known_at_every_shape(tmp_path: Path) -> None:
    def chosen(*known: int) -> list[Pair]:
        builder = chain(*DEAR)
        file = builder.file()
        file.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
        feeds = [{"x": matrix(rows, 32)} for rows in (5, 7)]
        rows = {key(*DEAR, rows=rows): FAST for rows in known}
        write_table(tmp_path / "table.json", {"provider": "cpu", "threads": 1}, rows)
        _, done = merged(read(file, feeds), feeds, Settings(cache=tmp_path / "table.json"), lambda *_: True, None)
        return pairs(done)

    assert (chosen(5), chosen(7), chosen(5, 7)) == ([], [], [("n0", "n1")])


@pytest.mark.parametrize("choices", [{"precision": "fp16"}, {"size": 0.5}], ids=["nothing is timed", "size"])
def test_a_dearer_product_is_not_for_every_goal(choices: dict[str, Any], tmp_path: Path) -> None:
    assert together(chain(*DEAR), tmp_path, {key(*DEAR): FAST}, **choices)[1] == ()


@pytest.mark.parametrize(("widths", "row"), [(CHEAP, SLOW), (DEAR, FAST)])
def test_a_table_of_another_machine_decides_too(widths: tuple[int, ...], row: dict[str, float], tmp_path: Path) -> None:
    _, done = together(chain(*widths), tmp_path, {key(*widths): row}, verify_latency=False)
    assert bool(done) == (row == FAST)


def test_a_product_of_many_entries_is_not_small() -> None:
    """A stride spares multiply-adds, and no entries."""
    builder = Builder(image(1, 24, 8, 8)).node("Conv", ["x", (4, 24, 1, 1)], "t")
    builder.node("Conv", ["t", (24, 4, 1, 1)], "y", strides=[2, 2])
    feeds = [{"x": builder.x}]
    (found,) = every(read(builder.file(), feeds), feeds).values()
    assert 1 < found.macs_after / found.macs_before < MOST
    assert not found.is_small


def test_one_that_does_not_pay_leaves_both_to_other_neighbours(tmp_path: Path) -> None:
    rows = {key(9, 8, 7): SLOW, key(8, 7, 6): FAST, key(9, 8, 6): SLOW}
    assert pairs(together(chain(9, 8, 7, 6), tmp_path, rows)[1]) == [("n1", "n2")]


def test_a_replay_multiplies_in_the_order_of_the_plan(tmp_path: Path) -> None:
    """n2 and n3 pay only once n2 has taken in the others, and are neighbours from the start."""
    builder = chain(9, 9, 9, 9, 8)
    known, done = together(builder, tmp_path, {key(9, 9, 8): SLOW, key(9, 9, 9): FAST})
    assert pairs(done) == [("n0", "n1"), ("n1", "n2")]
    plan = [("n0", "n1"), ("n1", "n2"), ("n2", "n3")]
    replayed, again = together(builder, tmp_path, {}, plan)
    assert pairs(again) == plan
    assert len(replayed.file.model.graph.node) == len(known.file.model.graph.node) - 1 == 1


def test_a_dearer_product_is_replayed_without_times(tmp_path: Path) -> None:
    builder = chain(*DEAR)
    known, done = together(builder, tmp_path, {key(*DEAR): FAST})
    for rows, choices in (({}, {}), ({key(*DEAR): SLOW}, {}), ({}, {"precision": "fp16", "merge": False})):
        replayed, again = together(builder, tmp_path, rows, pairs(done), **choices)
        assert again == done
        assert replayed.file.model == known.file.model


# Random chains, random tables


def sites_of(known: Read) -> list[Site]:
    return [seen(site, known.runs) for site in known.found.sites]


def offered(known: Read, sites: list[Site]) -> list[Merge]:
    """All products of two neighbours in a model."""
    found: list[Merge] = []

    def declined(one: Merge) -> bool:
        found.append(one)
        return False

    macs = {s.name: measure.multiply_adds({s.nodes[0]: known.runs[0][s.nodes[0]]}) for s in sites}
    list(merges(known.graph, sites, macs, declined))
    return found


def every(known: Read, feeds: list[dict[str, Array]]) -> dict[str, Merge]:
    """All products that can come up on any way through a model, by what a table calls them."""
    found: dict[str, Merge] = {}
    models, told = [known], set[tuple[str, ...]]()
    while models:
        now = models.pop()
        sites = sites_of(now)
        names = tuple(site.name for site in sites)
        if names in told:
            continue
        told.add(names)
        for one in offered(now, sites):
            name = f"merge {one.first.geometry.key()} {one.second.geometry.key()}"
            found[dataclasses.replace(one.product.geometry, op=name).key()] = one
            graph = Graph(now.file.model, now.file.folder)
            graph.apply(one.patch())
            models.append(read(dataclasses.replace(now.file, model=graph.commit()), feeds))
    return found


@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(builders(), st.integers(0, 2**32 - 1))
def test_predicted_times_never_rise_outputs_stay_and_twice_is_once(builder: Builder, seed: int) -> None:
    def time(site: Site) -> float:
        return random.Random(f"{seed} {site.geometry.key()}").lognormvariate(0, 1)

    feeds = [{"x": builder.x}]
    start = read(builder.file(), feeds)
    rows = {
        name: {"pair": time(one.first) + time(one.second), "dense": time(one.product)}
        for name, one in every(start, feeds).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        known, done = together(builder, Path(folder), rows)
        table = Settings(cache=Path(folder) / "table.json")
        assert merged(known, feeds, table, lambda *_: True, None) == (known, ())
        steps = [together(builder, Path(folder), {}, pairs(done)[:n]) for n in range(len(done) + 1)]
    (replayed, again), times = steps[-1], [sum(map(time, sites_of(step))) for step, _ in steps]
    assert all(after < before for before, after in itertools.pairwise(times))
    assert times[0] == sum(map(time, sites_of(start)))
    assert all(one.macs_after <= MOST * one.macs_before for one in done)
    assert same(run(start.file.model, builder.x), run(known.file.model, builder.x), 2000)
    assert (again, replayed.file.model) == (done, known.file.model)
