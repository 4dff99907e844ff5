"""Patches of an earlier plan are taken only for what has not changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_lowrank.calibration import Fits
from onnx_lowrank.plan import Decision
from onnx_lowrank.rewrite import rewritten
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.settings import Settings

Decisions = tuple[Decision, ...]


@pytest.fixture
def run(tmp_path: Path, low_rank_model: Callable[..., None]) -> Run:
    low_rank_model(tmp_path / "m.onnx")
    return start(tmp_path / "m.onnx", tmp_path / "m.npz", Settings(cache=tmp_path), Clock(lambda *_: None))


def at(run: Run, *ranks: int) -> Decisions:
    kinds = [("svd", rank) if rank else (None, None) for rank in ranks]
    return tuple(
        dataclasses.replace(Decision.of(site), kind=kind, rank=rank)
        for site, (kind, rank) in zip(run.loaded.sites, kinds, strict=True)
    )


def afresh(run: Run, fits: Fits, decisions: Decisions) -> bytes:
    return bytes(rewritten(run.loaded.file, run.loaded.sites, fits, decisions).SerializeToString())


def test_plans_in_turn_are_built_as_if_each_were_the_first(run: Run) -> None:
    one, other, third = at(run, 8, 8, 8), at(run, 8, 16, 0), at(run, 8, 8, 16)
    for decisions in (one, other, one, third, other):
        assert run.build(decisions).SerializeToString() == afresh(run, run.fits, decisions)


def test_other_fits_make_other_patches(run: Run) -> None:
    decisions, site = at(run, 8, 8, 8), run.loaded.sites[1]
    before = run.build(decisions).SerializeToString()
    fits = {**run.fits, site.name: dataclasses.replace(run.fits[site.name], weight=2.0 * site.weight)}
    after = dataclasses.replace(run, fits=fits).build(decisions).SerializeToString()
    assert after == afresh(run, fits, decisions)
    assert after != before
    assert run.build(decisions).SerializeToString() == before


def test_patches_of_sites_that_stay_are_let_go_of(run: Run) -> None:
    run.build(at(run, 8, 8, 8))
    run.build(at(run, 8, 0, 0))
    assert list(run.latest.known) == [run.loaded.sites[0].name]
