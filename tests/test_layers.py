"""Narrower layers from the candidates to the file: chosen where they pay, refitted, replayed byte for byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lowrank
from onnx_lowrank import layers
from onnx_lowrank.allocate import Choices
from onnx_lowrank.layers import widths, with_layers
from onnx_lowrank.plan import Decision, Plan, Refit
from onnx_lowrank.refit import refit
from onnx_lowrank.repair import repaired, replayed
from onnx_lowrank.run import Clock, Run, start, unrepaired
from onnx_lowrank.settings import Settings
from tests.saved import data, save

INPUTS, HIDDEN = 128, 512


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two residual layers, each hidden channel there about four times; the weights themselves have full rank."""
    folder = tmp_path_factory.mktemp("layers")
    rng, nodes, tensors, name = np.random.default_rng(0), [], [], "x"
    for i in range(2):
        first = rng.standard_normal((INPUTS, HIDDEN // 4)) / INPUTS**0.5
        wide = np.tile(first, 4) + 0.02 * rng.standard_normal((INPUTS, HIDDEN)) / INPUTS**0.5
        second = rng.standard_normal((HIDDEN, INPUTS)) / HIDDEN**0.5
        for local, value in (("u", wide), ("b", 0.1 * rng.standard_normal(HIDDEN)), ("v", second)):
            tensors.append(numpy_helper.from_array(value.astype(np.float32), f"{local}{i}"))
        nodes += [
            helper.make_node("MatMul", [name, f"u{i}"], [f"t{i}"], name=f"up{i}"),
            helper.make_node("Add", [f"t{i}", f"b{i}"], [f"s{i}"], name=f"bias{i}"),
            helper.make_node("Relu", [f"s{i}"], [f"r{i}"], name=f"relu{i}"),
            helper.make_node("MatMul", [f"r{i}", f"v{i}"], [f"d{i}"], name=f"down{i}"),
            helper.make_node("Add", [name, f"d{i}"], [f"y{i}"], name=f"join{i}"),
        ]
        name = f"y{i}"
    samples = np.random.default_rng(1).standard_normal((32, 128, INPUTS)).astype(np.float32)
    save(folder, nodes, tensors, name, samples)
    return folder


@pytest.fixture(scope="module")
def report(home: Path) -> onnx_lowrank.Report:
    return onnx_lowrank.optimize(
        home / "m.onnx", home / "out.onnx", data=data(home), max_loss=0.005, cache=home / "cache", require_speedup=1.1
    )


def test_redundant_layers_become_narrower_and_faster(home: Path, report: onnx_lowrank.Report) -> None:
    chosen = {d.node: d for d in report.plan.decisions}
    for i in range(2):
        up, down = chosen[f"up{i}"], chosen[f"down{i}"]
        assert (up.kind, down.kind) == ("nystrom", "nystrom")
        assert (up.partner, down.partner) == (down.node, up.node)
        assert up.rank == down.rank
        assert 0 < (up.rank or 0) <= HIDDEN * 3 // 4  # a quarter would do; which width is fastest is measured
    assert report.verdict.loss <= 0.005
    assert report.verdict.speedup.low > 1.1
    before, after = (onnx.load(home / name) for name in ("m.onnx", "out.onnx"))
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    row = report.to_dict()["sites"][0]
    assert (row["kind"], row["partner"]) == ("nystrom", "down0")


def test_a_replay_gives_the_same_bytes(home: Path, report: onnx_lowrank.Report) -> None:
    plan = Plan.from_json(report.plan.to_json())
    assert plan == report.plan
    onnx_lowrank.apply(plan, home / "m.onnx", home / "again.onnx", data=data(home), cache=home / "cache")
    assert (home / "again.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_other_kinds_alone_find_nothing(home: Path) -> None:
    found = onnx_lowrank.optimize(
        home / "m.onnx", home / "none.onnx", data=data(home), max_loss=0.005, cache=home / "cache",
        kinds=("svd", "pivot"),
    )  # fmt: skip
    assert not [d for d in found.plan.rewritten if d.kind == "nystrom"]


def decisions(run: Run, width: int) -> tuple[Decision, ...]:
    names = {"up0": "down0", "down0": "up0", "up1": "down1", "down1": "up1"}
    return tuple(
        Decision(
            s.name, s.geometry.op, (s.geometry.outputs, s.geometry.inputs), "nystrom", width, partner=names[s.name]
        )
        for s in run.loaded.sites
    )


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    settings = Settings(cache=home / "cache", max_loss=0.5, kinds=("nystrom",))
    return start(home / "m.onnx", data(home), settings, Clock(lambda *_: None))


def test_a_refit_moves_the_site_that_reads_and_lowers_the_loss(run: Run) -> None:
    plan = decisions(run, 96)
    before = run.loss_of(plan)
    found = repaired(run, plan)
    assert found.loss < before
    assert {node for one in found.refits for node in one.kept} <= {"down0", "down1"}
    again = replayed(run, plan, found.refits)
    build = dataclasses.replace(run, fits=again).build(plan)
    assert build.SerializeToString() == dataclasses.replace(run, fits=found.fits).build(plan).SerializeToString()


def test_a_refit_of_another_kind_keeps_the_order_of_the_channels(run: Run) -> None:
    svd = tuple(dataclasses.replace(d, kind="svd", rank=32, partner=None) for d in decisions(run, 96))
    fits = refit(run.loaded, run.settings, run.fits, svd, lambda *_: True, lambda *_: None)
    assert fits["down0"].weight is not None
    assert fits["down0"].narrow is run.fits["down0"].narrow
    mixed = [Refit.of(svd, ["down0"]), Refit.of(decisions(run, 96), ["down1"])]
    plan = Plan("", decisions(run, 96), 0.5, "cpu", 1, 0, 256, refits=tuple(mixed))
    assert unrepaired(plan)["down0"] == ("nystrom",)


@pytest.mark.parametrize(
    ("dense", "left"),
    [(2.5, {128: 0.25, 256: 0.5}), (9.0, {128: 0.1 * 2 / 9, 256: 0.1 * 4 / 9})],
    ids=["the difference", "more than the sites take"],
)
def test_what_a_layer_saves_is_shared_by_its_sites(
    run: Run, monkeypatch: pytest.MonkeyPatch, dense: float, left: dict[int, float]
) -> None:
    """A layer of 2.5 ms has sites of 0.8 and 1.2 ms, and 0.5 ms between them."""
    times = {HIDDEN: dense, 128: 1.0, 256: 1.5} if dense < 3 else {HIDDEN: dense, 128: 2.0, 256: 4.0}
    monkeypatch.setattr(layers, "_times", lambda *_: (times, 0.01))
    before = {"up0": 0.8, "down0": 1.2, "up1": 0.8, "down1": 1.2}
    choices = [Choices(Decision.of(site, before[site.name]), ()) for site in run.loaded.sites]
    for choice in with_layers(run.loaded, run.fits, run.table, choices, lambda *_: None):
        found = {c.rank: c.ms / before[choice.dense.node] for c in choice.candidates}
        assert found == pytest.approx(left)


def test_widths_are_whole_tiles_below_the_layer() -> None:
    assert widths(1536)[-3:] == (1248, 1344, 1440)
    assert widths(1536)[0] == 192
    assert all(width % 16 == 0 for width in widths(200))
    assert widths(16) == ()
