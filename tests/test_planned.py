"""Planning for a card that is not here: with a table in its documented form, on the CPU, without any timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnx_lowrank
from onnx_lowrank import measure, timing
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.sites import Why

WIDE = "MatMul 512x512 float32 x=64x512 bias=0 right"
CARD = {
    "processor": "a processor", "gpu": "NVIDIA Test Card", "driver": "1.2", "runtime": "onnxruntime-gpu 1.31.1",
    "provider": "cuda", "threads": 1, "provider_options": {"use_tf32": "0"},
}  # fmt: skip
ROW = {"dense": 0.050, "dense again": 0.0502, "svd 16": 0.020, "svd 32": 0.0201, "svd 128": 0.060, "pivot 32": 0.030}
"""On this card ranks 16 and 32 take the same time, 128 is slower than dense, and pivot pays less than svd."""


def write(path: Path, ms: dict[str, Any], **environment: Any) -> Path:
    """A table as docs/tables.md describes it."""
    path.write_text(json.dumps({"environment": {**CARD, **environment}, "ms": ms}))
    return path


@pytest.fixture
def home(tmp_path: Path, low_rank_model: Callable[..., None]) -> Path:
    low_rank_model(tmp_path / "wide.onnx")
    return tmp_path


def planned(home: Path, table: Path, **choices: Any) -> onnx_lowrank.Report:
    given = {"provider": "cuda", "provider_options": {"use_tf32": "0"}, "verify_latency": False, "cache": table}
    return onnx_lowrank.optimize(home / "wide.onnx", home / "out.onnx", data=home / "wide.npz", **{**given, **choices})


def test_a_plan_for_a_card_takes_its_ranks_and_times_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(timing, "interleave", refuse)
    monkeypatch.setattr(measure, "Session", refuse)
    report = planned(home, write(home / "t.json", {WIDE: ROW}))
    assert [(d.kind, d.rank) for d in report.plan.decisions] == [("svd", 32)] * 3
    told = report.to_dict()
    assert told["status"] == "optimized"
    verdict = told["verdict"]
    assert verdict["latency"] == "predicted"
    assert verdict["machine"] == "NVIDIA Test Card"
    assert verdict["speedup_ci"] is None
    assert verdict["speedup"] == pytest.approx(0.050 / 0.0201)
    assert verdict["provider_options"] == {"use_tf32": "0"}
    assert verdict["loss"] <= 0.01
    assert told["latency"] == []
    assert "as predicted from the table of NVIDIA Test Card for its sites alone" in report.verdict.sentence()
    assert onnx_lowrank.analyze(
        home / "wide.onnx", data=home / "wide.npz", provider="cuda", provider_options={"use_tf32": "0"},
        verify_latency=False, cache=home / "t.json",
    ).verdict.reason == "would rewrite 3 of 3 sites, 2.49× faster as predicted from the table for its sites alone, the other nodes left out"  # fmt: skip  # noqa: E501


def test_what_the_table_does_not_know_stays_with_that_reason(home: Path) -> None:
    other = "MatMul 512x512 float32 x=8x512 bias=0 right"
    report = planned(home, write(home / "t.json", {other: ROW}))
    assert not report
    assert {d.why for d in report.plan.decisions} == {Why.NOT_TIMED}
    assert report.to_dict()["verdict"]["latency"] == "predicted"
    assert (home / "out.onnx").read_bytes() == (home / "wide.onnx").read_bytes()


def test_nothing_is_predicted_to_pay(home: Path) -> None:
    slow = {label: 1.0 if label != "dense" else 0.05 for label in ROW}
    report = planned(home, write(home / "t.json", {WIDE: slow}))
    assert not report
    assert {d.why for d in report.plan.decisions} == {Why.NOT_FASTER}


def test_a_table_of_other_options_or_threads_is_refused(home: Path) -> None:
    table = write(home / "t.json", {WIDE: ROW})
    with pytest.raises(SettingsError, match="--provider-option use_tf32=0"):
        planned(home, table, provider_options={})
    with pytest.raises(SettingsError, match="with 1 threads"):
        planned(home, table, threads=4)
    with pytest.raises(SettingsError, match="provider cuda"):
        planned(home, table, provider="tensorrt")
    with pytest.raises(SettingsError, match="no table"):
        planned(home, home)


def test_the_whole_model_is_predicted_where_its_time_is_known(home: Path) -> None:
    here = home / "here"
    given: dict[str, Any] = {"data": home / "wide.npz", "cache": here, "refit": False}
    onnx_lowrank.optimize(home / "wide.onnx", home / "a.onnx", **given)
    (path,) = here.glob("latency-*.json")
    table = json.loads(path.read_text())
    (whole,) = (key for key in table["ms"] if key.startswith("whole "))
    dense = table["ms"][WIDE]["dense"] = 0.05
    rows = {WIDE: ROW, whole: {"ms": 4 * dense}}
    report = planned(home, write(home / "t.json", rows))
    assert report.verdict.scope == "the whole model"
    assert report.verdict.speedup.value == pytest.approx(4 * dense / (4 * dense - 3 * (dense - 0.0201)))


def test_fp16_is_planned_from_a_table_in_fp16(home: Path) -> None:
    table = write(home / "t.json", {WIDE: ROW}, precision="fp16")
    report = planned(home, table, precision="fp16")
    assert [(d.kind, d.rank) for d in report.plan.decisions] == [("svd", 32)] * 3
    assert report.verdict.latency == "predicted"
    assert report.verdict.precision == "fp16"
    assert report.verdict.scope.endswith("over fp16 alone")
    types = {t.data_type for t in onnx.load(home / "out.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    with pytest.raises(SettingsError, match="measured in fp16; give --precision fp16"):
        planned(home, table)
    with pytest.raises(SettingsError, match="leave --precision out"):
        planned(home, write(home / "u.json", {WIDE: ROW}), precision="fp16")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnx_lowrank", *words]
    environment = {**os.environ, "ONNX_LOWRANK_CACHE": str(folder / "cache")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command_line_plans_for_a_card(home: Path) -> None:
    write(home / "t.json", {WIDE: ROW})
    where = ["--provider", "cuda", "--provider-option", "use_tf32=0", "--no-verify-latency"]
    made = ["optimize", "wide.onnx", "-o", "out.onnx", "-d", "wide.npz", *where, "--cache", "t.json"]
    done = run(home, *made, "--plan-out", "p.json", "--report", "r.html")
    assert done.returncode == 0, done.stderr
    assert "as predicted from the table of NVIDIA Test Card" in " ".join(done.stdout.split())
    assert "predicted from the table of NVIDIA Test Card, not measured" in (home / "r.html").read_text()
    assert json.loads((home / "p.json").read_text())["provider_options"] == {"use_tf32": "0"}
    again = run(home, "apply", "p.json", "wide.onnx", "-o", "b.onnx", "--no-verify-latency", "--json")
    assert again.returncode == 0, again.stderr
    verdict = json.loads(again.stdout)["verdict"]
    assert (verdict["latency"], verdict["machine"]) == ("predicted", None)
    assert (home / "b.onnx").read_bytes() == (home / "out.onnx").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--provider", "cuda", "--no-verify-latency"], "--cache table.json"),
        (["--provider", "cuda", "--provider-option", "use_tf32"], "NAME=VALUE"),
        (["--provider", "cuda", "--no-verify-latency", "--cache", "t.json", "--require-speedup", "1.1"], "is measured"),
        (["--no-cpu-fallback"], "give cuda or tensorrt"),
    ],
)
def test_bad_choices_are_one_line_and_exit_2(home: Path, words: list[str], says: str) -> None:
    write(home / "t.json", {WIDE: ROW})
    done = run(home, "optimize", "wide.onnx", "-o", "out.onnx", "-d", "wide.npz", *words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (home / "out.onnx").exists()
