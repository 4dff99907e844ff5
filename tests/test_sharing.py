"""Common factors from the candidates to the file: chosen where they pay, refitted together, replayed byte for byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lowrank
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.fitting import calibrate
from onnx_lowrank.mixed import timed_choices
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.passes.shared import SHARED
from onnx_lowrank.plan import Decision, Plan, Refit
from onnx_lowrank.precision import Lowering
from onnx_lowrank.refit import groups
from onnx_lowrank.repair import repaired, replayed
from onnx_lowrank.rewrite import check_matches
from onnx_lowrank.run import Clock, Run, start, unrepaired
from onnx_lowrank.scheme import Scheme
from onnx_lowrank.settings import Settings
from tests.saved import data, save

WIDTH, COMMON = 512, 40
LETTERS = "qkv"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of three projections that look at few directions of what they read; their sum goes on."""
    folder = tmp_path_factory.mktemp("sharing")
    rng, nodes, tensors, name = np.random.default_rng(0), [], [], "x"
    for i in range(2):
        looked = rng.standard_normal((WIDTH, COMMON)) / WIDTH**0.5
        for letter in LETTERS:
            weight = looked @ rng.standard_normal((COMMON, WIDTH)) / COMMON**0.5
            weight += 0.03 * rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
            for local, value in (("w", weight), ("b", 0.1 * rng.standard_normal(WIDTH))):
                tensors.append(numpy_helper.from_array(value.astype(np.float32), f"{local}{letter}{i}"))
            nodes += [
                helper.make_node("MatMul", [name, f"w{letter}{i}"], [f"m{letter}{i}"], name=f"{letter}{i}"),
                helper.make_node("Add", [f"m{letter}{i}", f"b{letter}{i}"], [f"a{letter}{i}"], name=f"add{letter}{i}"),
                helper.make_node("Tanh", [f"a{letter}{i}"], [f"t{letter}{i}"], name=f"tanh{letter}{i}"),
            ]
        nodes += [
            helper.make_node("Mul", [f"tq{i}", f"tk{i}"], [f"p{i}"], name=f"gate{i}"),
            helper.make_node("Add", [f"p{i}", f"tv{i}"], [f"y{i}"], name=f"sum{i}"),
        ]
        name = f"y{i}"
    samples = np.random.default_rng(1).standard_normal((24, 256, WIDTH)).astype(np.float32)
    save(folder, nodes, tensors, name, samples)
    return folder


@pytest.fixture(scope="module")
def report(home: Path) -> onnx_lowrank.Report:
    # No other kind: which of two that take nearly the same time wins is a matter of the noise.
    return onnx_lowrank.optimize(
        home / "m.onnx",
        home / "out.onnx",
        data=data(home),
        max_loss=0.02,
        kinds=(SHARED,),
        cache=home / "cache",
        require_speedup=1.1,
    )


def test_sites_that_look_at_the_same_directions_share_a_factor(home: Path, report: onnx_lowrank.Report) -> None:
    chosen = {d.node: d for d in report.plan.decisions}
    for i in range(2):
        sharing = [chosen[f"{letter}{i}"] for letter in LETTERS]
        assert [d.kind for d in sharing] == ["shared"] * 3
        assert {d.sharers for d in sharing} == {tuple(d.node for d in sharing)}
        assert len({d.rank for d in sharing}) == 1
    assert report.verdict.loss <= 0.02
    assert report.verdict.speedup.low > 1.1
    ops = [node.op_type for node in onnx.load(home / "out.onnx").graph.node]
    assert (ops.count("MatMul"), ops.count("Concat")) == (8, 2)
    row = report.to_dict()["sites"][0]
    assert (row["kind"], list(row["sharers"])) == ("shared", ["q0", "k0", "v0"])


def test_a_replay_gives_the_same_bytes(home: Path, report: onnx_lowrank.Report) -> None:
    plan = Plan.from_json(report.plan.to_json())
    assert plan == report.plan
    onnx_lowrank.apply(plan, home / "m.onnx", home / "again.onnx", data=data(home), cache=home / "cache")
    assert (home / "again.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_a_site_that_is_given_back_takes_its_sharers_with_it(report: onnx_lowrank.Report) -> None:
    left = report.plan.giving_back(["k1"])
    assert [d.kind for d in left.decisions] == ["shared"] * 3 + [None] * 3
    assert [d.sharers for d in left.decisions][3:] == [()] * 3


def decisions(rank: int, letters: str = LETTERS) -> tuple[Decision, ...]:
    return tuple(
        Decision(f"{letter}{i}", "MatMul", (WIDTH, WIDTH), "shared", rank, sharers=tuple(f"{c}{i}" for c in letters))
        if letter in letters
        else Decision(f"{letter}{i}", "MatMul", (WIDTH, WIDTH))
        for i in range(2)
        for letter in LETTERS
    )


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    settings = Settings(cache=home / "cache", max_loss=0.5, confidence=0.5, kinds=("svd", "shared"))
    return start(home / "m.onnx", data(home), settings, Clock(lambda *_: None))


@pytest.mark.parametrize("letters", ["qkv", "qv"])
def test_a_refit_lowers_the_loss_and_is_replayed(run: Run, letters: str) -> None:
    plan = decisions(24, letters)
    before = run.loss_of(plan)
    found = repaired(run, plan)
    assert found.loss < before
    again = replayed(run, plan, found.refits)
    build = dataclasses.replace(run, fits=again).build(plan)
    assert build.SerializeToString() == dataclasses.replace(run, fits=found.fits).build(plan).SerializeToString()


def test_sites_that_share_are_refitted_in_one_pass(run: Run) -> None:
    mixed = (*decisions(24, "qv")[:3], *decisions(24)[3:])
    one_each = [[site.name for site in group] for group in groups(run.loaded.sites, mixed, 8)]
    assert one_each == [["q0", "v0"], ["q1", "k1", "v1"]]
    alone = [dataclasses.replace(d, kind="svd", sharers=()) for d in decisions(24)]
    assert [len(group) for group in groups(run.loaded.sites, alone, 8)] == [1] * 6


def test_a_replay_keeps_the_projections_of_sites_that_were_repaired_as_another_kind() -> None:
    svd = tuple(dataclasses.replace(d, kind="svd", sharers=()) for d in decisions(24))
    plan = Plan("", decisions(24), 0.5, "cpu", 1, 0, 256, refits=(Refit.of(svd, ["q0", "k0", "v0"]),))
    assert unrepaired(plan)["q0"] == ("shared",)


def test_every_set_has_candidates_and_their_parts_add_up(run: Run) -> None:
    found = {choice.dense.node: choice for choice in timed_choices(run)}
    shared = {node: [c for c in choice.candidates if c.kind == "shared"] for node, choice in found.items()}
    sets = {c.sharers for candidates in shared.values() for c in candidates}
    assert {names for names in sets if "q0" in names} == {("q0", "k0", "v0"), ("q0", "k0"), ("q0", "v0")}
    for names in sets:
        for rank in {c.rank for c in shared[names[0]] if c.sharers == names}:
            parts = [c for name in names for c in shared[name] if (c.sharers, c.rank) == (names, rank)]
            assert len(parts) == len(names)
            assert sum(c.weights for c in parts) == rank * (WIDTH + WIDTH * len(names) - rank)
            assert sum(c.ms for c in parts) < sum(found[name].dense.ms_before or 0.0 for name in names)
    errors = [c.error for c in sorted(shared["q0"], key=lambda c: c.rank) if len(c.sharers) == 3]
    assert errors == sorted(errors, reverse=True)


def test_in_8_bits_no_factor_is_shared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lowering = Lowering(Scheme("int8"), run.loaded.file.folder, "cpu")
    monkeypatch.setattr("onnx_lowrank.mixed.measured_choices", lambda *_: [])
    monkeypatch.setattr("onnx_lowrank.mixed.with_layers", lambda *_: [])

    def never(*_: Any) -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr("onnx_lowrank.mixed.with_shared", never)
    assert len(timed_choices(dataclasses.replace(run, lowering=lowering))) == 6
    with pytest.raises(AssertionError, match="asked for"):
        timed_choices(run)


def test_kinds_decide_whether_projections_are_fitted(home: Path) -> None:
    settings = Settings(cache=home / "cache", max_loss=0.5, kinds=("svd",))
    one = start(home / "m.onnx", data(home)[:4], settings, Clock(lambda *_: None))
    assert not any(fit.shared for fit in one.fits.values())
    other = dataclasses.replace(settings, kinds=("svd", "shared"), policy="uniform")
    baseline = start(home / "m.onnx", data(home)[:4], other, Clock(lambda *_: None))
    assert not any(fit.shared for fit in baseline.fits.values())


def test_what_cannot_be_written_by_pivots_shares_no_factor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lowrank.input_fits.PIVOT", dataclasses.replace(PIVOT, applies=lambda _: False))
    monkeypatch.setattr("onnx_lowrank.rewrite.PIVOT", dataclasses.replace(PIVOT, applies=lambda _: False))
    fits = calibrate(run.loaded, run.settings, lambda *_: None)
    assert not any(fit.shared for fit in fits.values())
    with pytest.raises(SettingsError, match="with its sharers here"):
        check_matches(decisions(24), run.loaded.sites)
