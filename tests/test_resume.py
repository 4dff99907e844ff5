"""Stages on disk: what goes in comes out, nothing else is read, and a run goes on where it was cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.calibration import Fit
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.linalg import Factorization, Metric
from onnx_lowrank.plan import Decision
from onnx_lowrank.resume import Stages, packed, run_key, unpacked
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Why


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, Fit | Factorization | Metric):
        return type(one) is type(other) and all(same(v, getattr(other, k)) for k, v in vars(one).items())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(v, other[k]) for k, v in one.items())
    return type(one) is type(other) and bool(one == other or one != one)


def test_values_come_out_as_they_went_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fit = Fit(Factorization(rng.standard_normal((4, 3)), rng.random(3), 2.5), rng.random(4), np.zeros(4))
    fit = Fit(fit.factorization, fit.mean, fit.linear, metric=Metric(np.eye(4), np.eye(4)))
    dense = Decision("größe/1", "MatMul", (4, 3), why=Why.SHARED, ms_before=0.1)
    value = {
        "fits": {"a": fit},
        "choices": [Choices(dense, (Candidate("svd", 2, 0.1, 1 / 3, float("inf")),), (), 7, 12)],
        "mixed": {"n": None, "t": (1, [2.5, True], "x"), "nan": float("nan"), "of": np.arange(3, dtype=np.int64)},
    }
    (tmp_path / "stage.npz").write_bytes(packed(value))
    found = unpacked(tmp_path / "stage.npz")
    assert same(found["fits"]["a"], fit)
    assert found["choices"] == value["choices"]
    assert same(found["mixed"], value["mixed"])


@pytest.mark.parametrize("value", [object(), Path("x"), np.array([object()]), {"f": print}])
def test_what_is_not_kept_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="not kept"):
        packed(value)


@pytest.mark.parametrize(
    "name", ["os:system", "onnx_lowrank.runtime:Session", "onnx_lowrank.cli:run", "subprocess:Popen"]
)
def test_a_foreign_class_in_a_stage_is_not_made(tmp_path: Path, name: str) -> None:
    """Files of a resume folder are no more trusted than any input."""
    plain = f'{{"schema": 1, "value": {{"class": "{name}", "fields": {{}}}}}}'
    np.savez(tmp_path / "fits-k.npz", structure=np.frombuffer(plain.encode(), np.uint8))
    with pytest.raises((ValueError, AttributeError)):
        unpacked(tmp_path / "fits-k.npz")
    assert Stages(tmp_path, "k").recall("fits", lambda: "made anew") == "made anew"


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    assert Stages(tmp_path, "a").recall("fits", lambda: [1]) == [1]
    again = Stages(tmp_path, "a")
    assert again.recall("fits", lambda: [2]) == [1]
    assert again.found == ["fits"]
    assert Stages(tmp_path, "b").recall("fits", lambda: [2]) == [2]
    assert Stages(None, "a").recall("fits", lambda: [3]) == [3]


def test_a_damaged_stage_is_made_again(tmp_path: Path) -> None:
    Stages(tmp_path, "a").recall("fits", lambda: [1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    assert Stages(tmp_path, "a").recall("fits", lambda: [2]) == [2]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match="--resume"):
        Stages(tmp_path / "file", "a")


def test_the_key_follows_model_data_and_settings(tmp_path: Path) -> None:
    sample = {"x": np.zeros((1, 2), np.float32)}

    def key(model: str = "m", data: Any = sample, **choices: Any) -> str:
        return run_key(model, Settings(**choices), [data], "v")

    others = [
        key("n"),
        key(data={"x": np.ones((1, 2), np.float32)}),
        key(data={"y": sample["x"]}),
        key(max_loss=0.02),
        key(seed=1),
    ]
    assert len({key(), *others}) == 6
    assert key(resume=tmp_path, cache=tmp_path) == key()
    for text in "ab":
        (tmp_path / f"{text}.json").write_text(text)
    assert len({key(), key(cache=tmp_path / "a.json"), key(cache=tmp_path / "b.json")}) == 3


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, low_rank_model: Callable[..., None]) -> None:
    low_rank_model(tmp_path / "wide.onnx")
    tool = [sys.executable, "-m", "onnx_lowrank"]
    analyze = [*tool, "analyze", "wide.onnx", "-d", "wide.npz", "-q", "--no-refit", "--cache", "cache"]
    for command in (analyze, [*tool, "cache", "export", "table.json", "--cache", "cache"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    words = ["optimize", "wide.onnx", "-d", "wide.npz", "-q", "--cache", "table.json", "--no-verify-latency"]

    def process(out: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*tool, *words, "-o", out, *more], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    first = process("a.onnx")
    assert first.wait(120) == 0, first.communicate()[1]
    killed = process("b.onnx", "--resume", "stages")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("stages/choices-*.npz")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "b.onnx").exists()
    time.sleep(1.1)  # what is younger than a second is nobody's to remove
    resumed = process("b.onnx", "--resume", "stages")
    assert resumed.wait(120) == 0, resumed.communicate()[1]
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"wide.onnx", "wide.npz", "a.onnx", "b.onnx", "cache", "stages", "table.json"}
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "stages").iterdir()) == ["choices", "fits", "plan"]
