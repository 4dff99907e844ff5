"""The command line as a user meets it: exit codes, one-line errors, nothing written on failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from tests.interrupts import MOMENTS, interrupted

TINY = """<ir_version: 8, opset_import: ["" : 17]>
tiny (float[n, 4] x) => (float[n, 2] y) <float[4, 2] w = {1, 2, 2, 4, 3, 6, 4, 8}> { y = MatMul(x, w) }"""


def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnx_lowrank", *map(str, words)]
    environment = {**os.environ, "ONNX_LOWRANK_CACHE": str(folder / "cache")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TINY), tmp_path / "tiny.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
    return tmp_path


BAD: list[tuple[str, list[str], str]] = [
    ("a missing file", ["optimize", "none.onnx", "-o", "out.onnx"], "none.onnx"),
    ("not a protobuf", ["optimize", "text.onnx", "-o", "out.onnx"], "text.onnx"),
    ("an empty file", ["optimize", "empty.onnx", "-o", "out.onnx"], "empty.onnx"),
    ("a directory", ["optimize", "folder", "-o", "out.onnx"], "folder"),
    ("a missing data file", ["optimize", "tiny.onnx", "-o", "out.onnx", "--data", "none.npz"], "none.npz"),
    ("a wrong name", ["optimize", "tiny.onnx", "-o", "out.onnx", "--data", "name.npz"], "'z'"),
    ("a wrong shape", ["optimize", "tiny.onnx", "-o", "out.onnx", "--data", "shape.npz"], "shape.npz"),
    ("a wrong dtype", ["optimize", "tiny.onnx", "-o", "out.onnx", "--data", "dtype.npz"], "float64"),
    ("zero samples", ["optimize", "tiny.onnx", "-o", "out.onnx", "--data", "zero.npz"], "zero.npz"),
    ("NaN", ["optimize", "tiny.onnx", "-o", "out.onnx", "--data", "nan.npz"], "nan.npz"),
    ("an unknown provider", ["optimize", "tiny.onnx", "-o", "out.onnx", "--provider", "cpuu"], "did you mean 'cpu'"),
    ("an unwritable OUT", ["optimize", "tiny.onnx", "-o", "no/such/out.onnx"], "no/such"),
    ("OUT = MODEL", ["optimize", "tiny.onnx", "-o", "tiny.onnx"], "--in-place"),
    ("an unknown kind", ["optimize", "tiny.onnx", "-o", "out.onnx", "--kinds", "svdd"], "did you mean 'svd'"),
    ("a bad number", ["optimize", "tiny.onnx", "-o", "out.onnx", "--max-loss", "many"], "max-loss"),
    ("a loss out of range", ["optimize", "tiny.onnx", "-o", "out.onnx", "--max-loss", "7"], "max_loss is 7"),
    ("an unknown option", ["optimize", "tiny.onnx", "-o", "out.onnx", "--max-los", "1"], "--max-los"),
    ("an unknown command", ["optimise", "tiny.onnx"], "optimise"),
    ("a bad shape", ["optimize", "tiny.onnx", "-o", "out.onnx", "--shape", "x"], "NAME:1,3,224,224"),
    ("two goals", ["optimize", "tiny.onnx", "-o", "out.onnx", "--speedup", "2", "--size", "0.5"], "two goals"),
    ("an unknown policy", ["optimize", "tiny.onnx", "-o", "out.onnx", "--policy", "unifrm"], "did you mean 'uniform'"),
    ("an unknown metric", ["optimize", "tiny.onnx", "-o", "out.onnx", "--metric", "top2"], "did you mean 'top1'"),
    ("a metric that is missing", ["analyze", "tiny.onnx", "--metric", "none.py:f", "-d", "x.npz"], "none.py"),
    ("a weight for no output", ["analyze", "tiny.onnx", "--output-weight", "z:2", "-d", "x.npz"], "no output 'z'"),
    ("a bad output weight", ["analyze", "tiny.onnx", "--output-weight", "y"], "NAME:2"),
    ("losses that are no numbers", ["sweep", "tiny.onnx", "-o", "models", "--losses", "small"], "--losses 'small'"),
    ("a sweep of no model", ["sweep", "text.onnx", "-o", "new/models"], "text.onnx"),
    ("a sweep as html", ["sweep", "tiny.onnx", "-o", "models", "--report", "r.html"], "reported as .json"),
    ("a table that is none", ["cache", "import", "text.onnx", "--cache", "cache"], "not a latency table"),
    (
        "a cache that is no table",
        ["analyze", "tiny.onnx", "--cache", "text.onnx", "-d", "x.npz"],
        "not a latency table",
    ),
    ("no table to export", ["cache", "export", "t.json", "--cache", "cache"], "no table"),
    ("a bad report name", ["optimize", "tiny.onnx", "-o", "out.onnx", "--report", "r.doc"], "r.doc"),
    ("a missing plan", ["apply", "none.json", "tiny.onnx", "-o", "out.onnx"], "none.json"),
    ("a file that is no plan", ["apply", "text.onnx", "tiny.onnx", "-o", "out.onnx"], "text.onnx"),
    ("one model to compare", ["compare", "tiny.onnx"], "two models"),
    ("an unknown zoo model", ["zoo", "get", "vgg17"], "did you mean 'vgg16'"),
]


@pytest.mark.parametrize(("words", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_line_and_exit_2(folder: Path, words: list[str], says: str) -> None:
    (folder / "text.onnx").write_text("this is not a model")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "folder").mkdir()
    good = np.ones((8, 4), np.float32)
    np.savez(folder / "name.npz", z=good)
    np.savez(folder / "shape.npz", x=np.ones((8, 5), np.float32))
    np.savez(folder / "dtype.npz", x=good.astype(np.float64))
    np.savez(folder / "zero.npz", x=good[:0])
    np.savez(folder / "nan.npz", x=np.where(np.arange(32).reshape(8, 4) == 9, np.nan, good).astype(np.float32))
    before = contents(folder)
    done = run(folder, *words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of a file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_model_that_cannot_gain_passes_through_unchanged(folder: Path) -> None:
    done = run(folder, "optimize", "tiny.onnx", "-o", "out.onnx", "--data", "x.npz", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "unchanged"
    assert report["verdict"]["reason"]
    assert (folder / "out.onnx").read_bytes() == (folder / "tiny.onnx").read_bytes()


def test_a_required_speedup_that_is_not_met_is_exit_3(folder: Path) -> None:
    done = run(folder, "optimize", "tiny.onnx", "-o", "out.onnx", "--data", "x.npz", "--require-speedup", "1.1")
    assert done.returncode == 3
    assert not (folder / "out.onnx").exists()


def test_a_low_rank_model_is_optimized_and_its_plan_replays_to_the_same_bytes(
    tmp_path: Path, low_rank_model: Callable[..., None]
) -> None:
    low_rank_model(tmp_path / "wide.onnx")
    first = run(tmp_path, "optimize", "wide.onnx", "-o", "a.onnx", "-d", "wide.npz", "--plan-out", "p.json", "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["status"] == "optimized"
    assert report["verdict"]["speedup_ci"][0] > 1
    assert report["verdict"]["loss"] <= 0.01
    again = run(tmp_path, "optimize", "wide.onnx", "-o", "b.onnx", "-d", "wide.npz", "--plan-out", "q.json", "-q")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "q.json").read_text() == (tmp_path / "p.json").read_text()
    replay = run(tmp_path, "apply", "p.json", "wide.onnx", "-o", "c.onnx")
    assert replay.returncode == 0, replay.stderr
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    compared = run(tmp_path, "compare", "wide.onnx", "c.onnx", "-d", "wide.npz", "--json")
    assert json.loads(compared.stdout)["models"][1]["loss"] <= 0.01


def test_a_table_is_listed_exported_and_imported(folder: Path) -> None:
    words = ["--cache", "here", "-q", "--kinds", "conv_svd"]  # of no use to a MatMul: only the dense weight is timed
    assert run(folder, "analyze", "tiny.onnx", "-d", "x.npz", *words).returncode == 0
    assert "times of 1 geometries" in run(folder, "cache", "ls", "--cache", "here").stdout
    assert run(folder, "cache", "export", "t.json", "--cache", "here").returncode == 0
    assert run(folder, "cache", "import", "t.json", "--cache", "there").returncode == 0
    assert "1 tables deleted" in run(folder, "cache", "clear", "--cache", "there").stdout
    assert "no tables" in run(folder, "cache", "ls", "--cache", "there").stdout


def test_a_sweep_prints_a_row_a_model(tmp_path: Path, low_rank_model: Callable[..., None]) -> None:
    low_rank_model(tmp_path / "wide.onnx")
    words = ["sweep", "wide.onnx", "-o", "models", "-d", "wide.npz", "--losses", "0.1,0.001", "--report", "r.json"]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == [
        "models/wide-0.001.onnx",
        "models/wide-0.1.onnx",
    ]
    assert [entry["verdict"]["loss_limit"] for entry in json.loads((tmp_path / "r.json").read_text())] == [0.001, 0.1]


def test_a_plan_for_another_graph_is_refused(tmp_path: Path, low_rank_model: Callable[..., None]) -> None:
    low_rank_model(tmp_path / "wide.onnx")
    low_rank_model(tmp_path / "other.onnx", width=256)
    assert (
        run(tmp_path, "optimize", "wide.onnx", "-o", "a.onnx", "-d", "wide.npz", "--plan-out", "p.json").returncode == 0
    )
    done = run(tmp_path, "apply", "p.json", "other.onnx", "-o", "b.onnx", "-d", "other.npz")
    assert done.returncode == 2
    assert "512×512 in the plan" in done.stderr
    plan = json.loads((tmp_path / "p.json").read_text())
    plan["decisions"] = [{**d, "kind": None, "rank": None, "shape": [512, 511]} for d in plan["decisions"]]
    (tmp_path / "dense.json").write_text(json.dumps(plan))
    done = run(tmp_path, "apply", "dense.json", "wide.onnx", "-o", "b.onnx", "-d", "wide.npz")
    assert done.returncode == 2
    assert "512×511 in the plan" in done.stderr


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, low_rank_model: Callable[..., None], moment: str) -> None:
    low_rank_model(tmp_path / "wide.onnx", layers=6)
    (tmp_path / "out.onnx").write_bytes(b"the previous one")
    code, said = interrupted(tmp_path, moment, signal.SIGINT)
    assert (code, "Traceback" in said) == (130, False), said
    assert (tmp_path / "out.onnx").read_bytes() == b"the previous one"
    assert {p.name for p in tmp_path.iterdir()} <= {"wide.onnx", "wide.npz", "out.onnx", "cache"}


def test_every_command_has_help() -> None:
    commands = [
        [],
        ["optimize"],
        ["analyze"],
        ["apply"],
        ["sweep"],
        ["compare"],
        ["zoo"],
        ["zoo", "ls"],
        ["zoo", "get"],
    ]
    for words in [*commands, ["cache"], *(["cache", name] for name in ("ls", "clear", "export", "import"))]:
        done = run(Path.cwd(), *words, "--help")
        assert done.returncode == 0
        assert "Usage: " in done.stdout
