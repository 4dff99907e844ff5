"""Repair with data: the loss never rises, a replay gives the same factors, groups follow the graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.plan import Decision, Plan, Refit
from onnx_lowrank.refit import effort, groups, refit
from onnx_lowrank.repair import Repaired, next_faster, repaired, replayed, spent
from onnx_lowrank.run import Clock, Run, start, unrepaired
from onnx_lowrank.settings import Settings

WIDTH, LAYERS = 24, 7
TWO, TERMS = ("tucker", "asym3d"), ("branch2", "branch2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Seven convolutions of 3×3 behind ReLUs, the last of them pointwise; smooth inputs, plenty of positions."""
    folder = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    nodes, tensors, name, channels = [], [], "x", 3
    for i in range(LAYERS):
        size = 1 if i == LAYERS - 1 else 3
        weight = rng.standard_normal((WIDTH, channels, size, size)) * 1.4 / np.sqrt(channels * size * size)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        tensors.append(numpy_helper.from_array(rng.standard_normal(WIDTH).astype(np.float32) * 0.3, f"b{i}"))
        pads = [size // 2] * 4
        nodes.append(helper.make_node("Conv", [name, f"w{i}", f"b{i}"], [f"t{i}"], name=f"conv{i}", pads=pads))
        nodes.append(helper.make_node("Relu", [f"t{i}"], [f"y{i}"]))
        name, channels = f"y{i}", WIDTH
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 20, 20])
    y = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", WIDTH, 20, 20])
    graph = helper.make_graph(nodes, "deep", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    samples = rng.standard_normal((24, 1, 3, 20, 20)).cumsum(axis=3).cumsum(axis=4) / 10
    data = [{"x": sample.astype(np.float32)} for sample in samples]
    return start(
        folder / "m.onnx", data, Settings(cache=folder / "cache", max_loss=0.2, confidence=0.5), Clock(lambda *_: None)
    )


def decisions(rank: int) -> tuple[Decision, ...]:
    inputs = [27, *[WIDTH * 9] * (LAYERS - 2), WIDTH]
    kinds = ["spatial", *["conv_svd", "spatial"] * 2, "pivot", "svd"]
    found = [Decision(f"conv{i}", "Conv", (WIDTH, k), ms_before=1.0) for i, k in enumerate(inputs)]
    return tuple(
        dataclasses.replace(d, kind=kind, rank=min(rank, d.shape[1] - 1), ms_after=0.5)
        for d, kind in zip(found, kinds, strict=True)
    )


def test_a_refit_lowers_the_loss_of_a_deep_model(run: Run) -> None:
    plan = decisions(12)
    before = run.loss_of(plan)
    found = repaired(run, plan)
    assert found.refits
    assert found.loss < 0.95 * before
    assert dataclasses.replace(run, fits=found.fits).loss_of(plan) == pytest.approx(found.loss)


def test_a_replay_gives_the_same_bytes(run: Run) -> None:
    plan = decisions(12)
    found = repaired(run, plan)
    first = dataclasses.replace(run, fits=found.fits).build(plan)
    again = dataclasses.replace(run, fits=replayed(run, plan, found.refits)).build(plan)
    assert again.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


def test_a_group_that_is_not_kept_keeps_its_factors(run: Run) -> None:
    plan = decisions(12)
    fits = refit(run.loaded, run.settings, run.fits, plan, lambda *_: False, lambda *_: None)
    assert fits == dict(run.fits)


def test_groups_follow_the_graph_and_hold_what_is_rewritten(run: Run) -> None:
    plan = tuple(d if d.node != "conv2" else dataclasses.replace(d, kind=None, rank=None) for d in decisions(12))
    names = [[site.name for site in group] for group in groups(run.loaded.sites, plan, 5)]
    assert [name for group in names for name in group] == [f"conv{i}" for i in (0, 1, 3, 4, 5, 6)]
    assert len(names) <= 5


def test_what_a_repair_wins_is_spent_on_a_faster_plan_that_is_repaired_too(run: Run) -> None:
    mild, middle, bold = decisions(20), decisions(16), decisions(12)
    asked: list[Repaired] = []

    def further(one: Repaired) -> tuple[Decision, ...] | None:
        asked.append(one)
        return faster(middle, 0.4) if len(asked) == 1 else faster(bold, 0.3) if len(asked) == 2 else None

    found = spent(run, mild, further)
    assert found.decisions == faster(bold, 0.3)
    assert [one.decisions for one in asked] == [mild, faster(middle, 0.4), faster(bold, 0.3)]
    assert [one.plan(mild)[1].rank for one in found.refits] == [20, 16, 12]
    again = dataclasses.replace(run, fits=replayed(run, found.decisions, found.refits))
    there = dataclasses.replace(run, fits=found.fits)
    assert again.build(bold).SerializeToString(deterministic=True) == there.build(bold).SerializeToString(
        deterministic=True
    )


def pairs(inner: int, *names: str) -> tuple[Decision, ...]:
    """The 3×3 convolutions as kinds of two ranks."""
    kinds = {f"conv{i}": names[i % 2] for i in range(1, LAYERS - 1)}
    return tuple(
        dataclasses.replace(d, kind=kinds[d.node], rank=10, inner=inner) if d.node in kinds else d
        for d in decisions(12)
    )


def choices(plan: tuple[Decision, ...]) -> list[Choices]:
    """Each site may take the kind and the size of a plan, which is faster than what it has."""
    undecided = [dataclasses.replace(d, kind=None, rank=None, inner=0) for d in plan]
    return [
        Choices(dense, (Candidate(d.kind or "", d.rank or 0, 0.1, 0.4, 0.1, inner=d.inner),))
        for dense, d in zip(undecided, plan, strict=True)
    ]


@pytest.mark.parametrize(
    ("mild", "bold"),
    [(decisions(20), decisions(12)), (pairs(9, *TWO), pairs(6, *TWO)), (pairs(8, *TERMS), pairs(6, *TERMS))],
    ids=["one", "two", "terms"],
)
def test_the_next_faster_size_is_polished_along_and_replayed_to_the_bit(
    run: Run, mild: tuple[Decision, ...], bold: tuple[Decision, ...]
) -> None:
    found = spent(run, mild, lambda one: faster(bold, 0.4) if one.decisions == mild else None, choices(bold))
    assert found.decisions == faster(bold, 0.4)
    first = found.fits["conv2"].polished
    assert first  # of the last refit, which starts from what the first one left
    one = repaired(run, mild, choices(bold))
    alone = repaired(run, mild)
    sizes = {(d.node, d.kind, d.rank, d.inner) for d in (*mild, *bold)}
    assert {(node, *key) for node, fit in one.fits.items() for key in fit.polished} <= sizes
    d = bold[2]
    assert (d.kind, d.rank, d.inner) in one.fits["conv2"].polished
    assert (d.kind, d.rank, d.inner) not in alone.fits["conv2"].polished
    assert one.loss == alone.loss  # what is ready does not change what is there
    for fits, refits in ((one.fits, one.refits), (found.fits, found.refits)):
        again = dataclasses.replace(run, fits=replayed(run, bold, refits)).build(bold)
        there = dataclasses.replace(run, fits=fits).build(bold)
        assert again.SerializeToString(deterministic=True) == there.SerializeToString(deterministic=True)


def test_the_next_faster_size_is_of_the_same_kind_and_site() -> None:
    plan = faster(decisions(12), 1.0)
    dense = Decision("conv2", "Conv", (WIDTH, WIDTH * 9), ms_before=1.0)
    kind = plan[2].kind or ""
    offered = (
        Candidate(kind, 10, 0.1, 0.9, 0.1),
        Candidate(kind, 6, 0.2, 0.5, 0.2),
        Candidate(kind, 14, 0.05, 1.1, 0.05),
        Candidate("pivot" if kind != "pivot" else "svd", 11, 0.1, 0.95, 0.1),
        Candidate(kind, 11, 0.1, 0.95, 0.1, partner="conv3"),
    )
    assert next_faster([Choices(dense, offered)], plan) == {"conv2": {(10, 0)}}
    assert next_faster([Choices(dense, offered[2:])], plan) == {}


def test_a_plan_that_is_not_faster_is_not_taken(run: Run) -> None:
    mild = decisions(16)
    assert spent(run, mild, lambda _: decisions(12)).decisions == mild
    assert spent(run, mild, lambda _: None).decisions == mild


def test_the_loss_of_what_is_returned_was_measured(run: Run) -> None:
    found = spent(run, decisions(16), lambda _: None)
    assert found.loss < run.loss_of(decisions(16))
    assert dataclasses.replace(run, fits=found.fits).loss_of(found.decisions) == pytest.approx(found.loss)


def faster(plan: tuple[Decision, ...], ms: float) -> tuple[Decision, ...]:
    return tuple(dataclasses.replace(d, ms_after=ms) for d in plan)


def test_a_replay_needs_first_fits_of_what_was_not_repaired_then() -> None:
    a, b, c = (Decision(name, "MatMul", (4, 4), "svd", 2) for name in "abc")
    first = Refit.of((a, dataclasses.replace(b, kind="pivot")), ["a"])
    second = Refit.of((a, b), ["a", "b"])
    plan = Plan("", (a, b, c), 0.1, "cpu", 1, 0, 8, refits=(first, second))
    assert unrepaired(plan) == {"b": ("pivot",), "c": ("svd",)}


def test_a_site_whose_moments_would_not_fit_into_memory_is_left_as_it_is(run: Run) -> None:
    first, *others = run.loaded.sites
    wide = dataclasses.replace(first, geometry=dataclasses.replace(first.geometry, inputs=25088))
    found = groups((wide, *others), decisions(12), 5)
    assert [site.name for group in found for site in group] == [site.name for site in others]


def test_the_original_is_never_changed(run: Run) -> None:
    assert Path(run.loaded.file.path).read_bytes() == run.loaded.file.model.SerializeToString()


@pytest.mark.parametrize(
    ("macs", "count", "expected"),
    [(10**12, 100, (3, 32)), (10**6, 100, (8, 100)), (10**12, 20, (3, 20)), (15 * 10**8, 192, (8, 62)), (0, 3, (8, 3))],
)
def test_a_quick_model_gets_more_passes_and_samples(macs: int, count: int, expected: tuple[int, int]) -> None:
    assert effort(macs, count) == expected


def test_a_refit_takes_back_what_the_residual_stream_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    for i in range(4):
        for part, op in (("a", "Relu"), ("b", None)):
            weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
            tensors.append(numpy_helper.from_array(weight, f"{part}{i}"))
            x = name if part == "a" else f"relu{i}"
            nodes.append(helper.make_node("MatMul", [x, f"{part}{i}"], [f"{part}{i}.y"], name=f"{part}{i}.matmul"))
            if op:
                nodes.append(helper.make_node(op, [f"{part}{i}.y"], [f"relu{i}"]))
        nodes.append(helper.make_node("Add", [name, f"b{i}.y"], [f"sum{i}"]))
        name = f"sum{i}"
    shapes = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", WIDTH]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "residual", shapes[:1], shapes[1:], tensors)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    data = [{"x": rng.standard_normal((64, WIDTH)).astype(np.float32)} for _ in range(24)]
    run = start(path, data, Settings(cache=tmp_path / "cache", max_loss=0.5), Clock(lambda *_: None))
    joined = {site.name: site.joins for site in run.loaded.sites if site.joins}
    assert joined == {f"b{i}.matmul": (f"sum{i}", f"sum{i - 1}") for i in range(1, 4)}
    plan = tuple(
        Decision(site.name, "MatMul", (WIDTH, WIDTH), "svd", 10, ms_before=1.0, ms_after=0.5)
        for site in run.loaded.sites
    )
    alone = tuple(dataclasses.replace(site, joins=None) for site in run.loaded.sites)
    without = dataclasses.replace(run, loaded=dataclasses.replace(run.loaded, sites=alone))
    assert repaired(run, plan).loss < 0.97 * repaired(without, plan).loss
