"""The suite for a card, as far as a machine without one can go: its models, its dry run, its tables."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank.latency import DENSE, LatencyTable, read_table
from onnx_lowrank.runtime import Session

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def random_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("random_models")


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50", 25_557_032), ("vit-b", 86_567_656), ("bert-base", 109_482_240)]
)
def test_random_models_have_the_parameters_of_the_published_ones(
    random_models: Any, name: str, parameters: int
) -> None:
    assert random_models.MODELS[name]().net.parameters == parameters


@pytest.mark.parametrize("name", ["resnet50", "vit-b", "bert-base"])
def test_random_models_are_valid_and_run_at_any_batch(random_models: Any, tmp_path: Path, name: str) -> None:
    built = random_models.MODELS[name](**random_models.TINY[name])
    built.save(tmp_path / "m.onnx", seed=3)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    session = Session(tmp_path / "m.onnx")
    types = {name: dtype for name, dtype, _ in session.inputs()}
    for batch in (1, 3):
        feed = {name: np.ones(shape, types[name]) for name, shape in built.batch(batch).items()}
        (y,) = session.run(feed)
        assert y.shape == (batch, built.width)
        assert np.isfinite(y).all()
    built.save(tmp_path / "again.onnx", seed=3)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_the_spectrum_of_a_random_weight_falls_as_it_says(random_models: Any) -> None:
    w = random_models.spectral(np.random.default_rng(0), 512, 256, 2.0)
    assert np.mean((w.astype(np.float64) ** 2).sum(1)) == pytest.approx(2.0, rel=1e-4)
    energy = np.linalg.svd(w, compute_uv=False) ** 2
    behind = energy[128:].sum() / energy.sum()
    ideal = np.arange(1, 257) ** (-2 * random_models.DECAY)
    assert behind == pytest.approx(ideal[128:].sum() / ideal.sum(), rel=0.5)


def suite(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "gpu_suite.py"), "--provider", "cpu", "--dry-run", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_dry_run_measures_every_part_and_goes_on_where_it_was(tmp_path: Path) -> None:
    nothing = suite(tmp_path, "--seconds", "0")
    assert nothing.returncode == 3, nothing.stderr
    first = suite(tmp_path, "--part", "staircases")
    assert first.returncode == 0, first.stderr
    done = suite(tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "staircases:" not in done.stdout  # measured by the first run
    parts = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert {"providers", "correctness", "staircases", "latency", "precisions", "table-cpu"} <= set(parts)
    errors = [i for p in parts.values() for i in p.get("items", {}).values() if "error" in i]
    assert not errors
    assert parts["providers"]["items"]["binding"]["equal"]
    assert all(i["difference"] < 1e-3 for i in parts["correctness"]["items"].values())
    rows = parts["latency"]["items"]
    assert set(rows) == {f"{name} fp32 b2" for name in ("resnet50", "vit-b", "bert-base")}
    for row in rows.values():
        assert set(row["groups"]) == {"all", "depth_preserving", "depth_adding"}
        assert set(row["low_rank"]["share_of_gain"]) == {"depth_preserving", "depth_adding"}
    four = parts["precisions"]["items"]["resnet50 int8 b2"]
    names = ["original", "int8 alone", "low rank alone", "low rank and int8"]
    assert [column["name"] for column in four["precisions"]] in ([], names[:2], names)  # none when int8 does not pay
    assert four["status"] == ("optimized" if four["precisions"] else "unchanged")
    environment, times = read_table(tmp_path / "table-cpu.json")
    assert environment["provider"] == "cpu"
    assert LatencyTable(tmp_path / "table-cpu.json", provider="cpu", threads=1).given
    measured = parts["staircases"]["items"]["fp32 MatMul 64x64 8"]
    assert times[measured["geometry"]][DENSE] == measured["dense_ms"]
