"""What `analyze` prints of the staircases: which ranks are steps, and which are never chosen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnx_lowrank
from onnx_lowrank.passes.tucker import TUCKER
from onnx_lowrank.report import Report
from onnx_lowrank.sites import Geometry
from onnx_lowrank.staircase import eligible, right_edges
from onnx_lowrank.terminal import show_report
from tests.saved import ROW, save_table

CONV = Geometry("Conv", 128, 1152, "float32", True, 17, channels=128, kernel=(3, 3))


@pytest.fixture
def report(tmp_path: Path, low_rank_model: Callable[..., None]) -> Report:
    low_rank_model(tmp_path / "wide.onnx", 1)
    table = save_table(tmp_path / "t.json", 512)
    return onnx_lowrank.analyze(
        tmp_path / "wide.onnx", data=tmp_path / "wide.npz", cache=table, verify_latency=False, refit=False
    )


def printed(report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    show_report(report, quiet=False, analysis=True)
    return capsys.readouterr().out.splitlines()


def test_a_rank_above_which_another_is_as_fast_is_said_to_be_never_chosen(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 16 and 32 take the same time: 32 is the edge of the step, and it is what the plan takes."""
    (key,) = report.staircases
    assert report.staircases[key] == ROW
    start = (lines := printed(report, capsys, monkeypatch)).index(f"{key}: dense 0.0500 ms")
    assert lines[start + 1 : start + 3] == ["  svd 32:0.0201 128:0.0600", "    never chosen: 16:0.0200"]
    assert [(d.kind, d.rank) for d in report.plan.decisions] == [("svd", 32)]


def test_a_baseline_may_choose_what_is_no_edge(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(report.plan, policy="flops")
    lines = printed(dataclasses.replace(report, plan=plan), capsys, monkeypatch)
    assert "    no faster than a larger rank: 16:0.0200" in lines
    assert not any("never chosen" in line for line in lines)


def test_steps_are_of_each_kind_and_of_the_costliest_geometries(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = {"dense": 9.0, "dense again": 9.0, "pivot 16": 1.0, "pivot 8": 0.5, "svd 8": 3.0, "svd 16": 3.02}
    many = {f"geometry {ms}": {"dense": float(ms), "svd 8": 0.1} for ms in range(1, 9)}
    known = dataclasses.replace(report, staircases={**many, "geometry 9": rising, "of no rank": {"dense": 99.0}})
    lines = printed(known, capsys, monkeypatch)
    assert [line for line in lines if ": dense " in line] == [
        f"geometry {n}: dense {n}.000 ms" for n in range(9, 3, -1)
    ]
    start = lines.index("geometry 9: dense 9.000 ms")
    assert lines[start + 1 : start + 4] == ["  pivot 8:0.500 16:1.000", "  svd 16:3.020", "    never chosen: 8:3.000"]
    assert not quiet(known, capsys)


def quiet(report: Report, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines about geometries where only the verdict is asked for."""
    show_report(report, quiet=True, analysis=True)
    return [line for line in capsys.readouterr().out.splitlines() if "geometry" in line]


def test_two_times_are_equal_within_the_noise_of_their_own_row(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ranks are chosen: dense against itself was off by 4 %, so 3 % more are no step."""
    row = {"dense": 1.0, "dense again": 1.04, "svd 8": 0.50, "svd 16": 0.515, "svd 24": 0.55}
    lines = printed(dataclasses.replace(report, staircases={"g": row}), capsys, monkeypatch)
    start = lines.index("g: dense 1.000 ms")
    assert lines[start + 1 : start + 3] == ["  svd 16:0.515 24:0.550", "    never chosen: 8:0.500"]


def test_of_two_ranks_only_what_is_smaller_in_both_is_said_to_be_never_chosen(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16x48 is faster than 64x32 because it has less work, not because it is a larger one of the same step."""
    assert TUCKER.macs(CONV, 48, 16) < TUCKER.macs(CONV, 32, 64)
    row = {"dense": 1.0, "tucker 64x32": 0.5, "tucker 16x48": 0.4, "tucker 16x16": 0.4, "tucker 64x64": 0.9}
    lines = printed(dataclasses.replace(report, staircases={"g": row}), capsys, monkeypatch)
    start = lines.index("g: dense 1.000 ms")
    assert lines[start + 1] == "  tucker 64x32:0.500 16x48:0.400 64x64:0.900"
    assert lines[start + 2] == "    never chosen: 16x16:0.400"


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(st.dictionaries(SIZES, st.sampled_from([0.1, 0.2, 0.201, 0.21, 0.3]), max_size=12), st.floats(0.01, 0.08))
def test_what_is_never_chosen_is_no_right_edge_in_the_order_of_the_work(
    ms: dict[tuple[int, ...], float], noise: float
) -> None:
    """The order in which candidates are found: by multiply-adds, which only the geometry tells."""
    steps = sorted(ms, key=lambda size: (TUCKER.macs(CONV, *size), size))
    edges = right_edges({step: ms[size] for step, size in enumerate(steps)}, noise)
    assert {steps[step] for step in edges} <= eligible(ms, noise)


@given(st.dictionaries(st.integers(1, 99), st.floats(0.1, 1.0), max_size=9), st.floats(0.01, 0.08))
def test_sizes_of_one_rank_may_be_chosen_at_right_edges(ms: dict[int, float], noise: float) -> None:
    found = eligible({(rank,): time for rank, time in ms.items()}, noise)
    assert found == {(rank,) for rank in right_edges(ms, noise)}
    for rank, larger in itertools.combinations(sorted(ms), 2):
        assert (rank,) not in found or ms[larger] > ms[rank]
