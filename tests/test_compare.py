"""`compare` for any models: failures leave the rest alone, every way of timing, and the change since last time."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import parser
from rich.console import Console

from onnx_lowrank import regressions, sidebyside
from onnx_lowrank.compare import compare
from onnx_lowrank.errors import LowRankError, RequirementError, SettingsError
from onnx_lowrank.html import html
from onnx_lowrank.labels import file_names
from onnx_lowrank.markdown import markdown
from tests.test_html import Page, check

if TYPE_CHECKING:
    from tests.conftest import Written

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 4] x) => (float[n, 4] {out}) <float[4, 4] w = {{{weights}}}> {{ {out} = MatMul(x, w) }}"""


def save(path: Path, scale: float = 1.0, out: str = "y") -> Path:
    weights = ", ".join(str(float(scale * (i % 5 - 2))) for i in range(16))
    onnx.save(parser.parse_model(TEXT.format(out=out, weights=weights)), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(folder / "one.onnx")
    save(folder / "two.onnx", 1.01)
    save(folder / "other.onnx", out="z")
    (folder / "broken.onnx").write_bytes((folder / "one.onnx").read_bytes()[:40])
    unknown = onnx.load(folder / "one.onnx")
    unknown.graph.node[0].op_type = "Unheard"
    onnx.save(unknown, folder / "unknown.onnx")
    return folder


def compared(folder: Path, *names: str, **choices: Any) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    return compare([folder / name for name in names], data=[{"x": one} for one in x], **choices).to_dict()


def test_models_that_fail_have_a_line_and_the_rest_stands(models: Path) -> None:
    data = compared(models, "broken.onnx", "one.onnx", "other.onnx", "two.onnx", "unknown.onnx")
    errors = [row["error"] for row in data["models"]]
    assert data["baseline"] == 1
    assert "not an ONNX model" in errors[0]
    assert errors[1] is errors[3] is None
    assert "no output 'y'" in errors[2]
    assert "Unheard" in errors[4]
    assert all("\n" not in error for error in errors if error)
    assert [row["latency"] is not None for row in data["models"]] == [False, False, False, True, False]
    assert data["models"][3]["loss"] == pytest.approx(1e-4, rel=1e-4)
    assert {row["model"] for row in data["cold"]} == {"one.onnx", "two.onnx"}
    page, text = html(data), markdown(data)
    for name in ("broken.onnx", "other.onnx", "unknown.onnx"):
        assert f"<strong>{name}</strong> could not be compared" in page
        assert f"**{name} could not be compared:**" in text


def test_fewer_than_two_models_are_no_comparison(models: Path) -> None:
    with pytest.raises(LowRankError, match=r"fewer than two.*broken\.onnx"):
        compared(models, "broken.onnx", "one.onnx", brief=True)
    with pytest.raises(LowRankError, match=r"no model could be run.*broken\.onnx.*unknown\.onnx"):
        compared(models, "broken.onnx", "unknown.onnx", brief=True)


def test_every_shape_and_number_of_threads_is_timed(models: Path) -> None:
    shapes = ({"x": (2, 4)}, {"x": (5, 4)}, {"x": (2, 7)})
    paths = [models / "one.onnx", models / "two.onnx"]
    data = compare(paths, threads=[1, 2], provider=["cpu", "cuda"], shapes=shapes, streams=2, brief=True).to_dict()
    ways = [(c["threads"], c["shape"]["x"]) for c in data["configurations"]]
    assert ways == [(1, [2, 4]), (1, [5, 4]), (2, [2, 4]), (2, [5, 4])]
    row = data["models"][1]
    for entry, (threads, shape) in zip((row["latency"], *row["latencies"]), ways, strict=True):
        assert (entry["threads"], entry["shape"]["x"]) == (threads, shape)
        assert entry["before"]["streams"] == 2
        assert entry["after"]["streams_per_second"] > 0
        windows = entry["after"]["streams_windows_per_second"]
        assert entry["after"]["streams_per_second"] == pytest.approx(np.median(windows), rel=1e-9)
    assert any("a shape was not timed" in w and "2,7" in w for w in data["warnings"])
    assert any("not timed on cuda" in w for w in data["warnings"])
    rows = Page(html(data)).rows("matrix")
    for cells, entry in zip(rows, (row["latency"], *row["latencies"]), strict=True):
        for cell, value in zip(
            cells[1:], (entry["before"]["p50_ms"], entry["after"]["p50_ms"], entry["ratio"]), strict=True
        ):
            check(cell, value)
    assert "accuracy" not in data


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_table_fits(models: Path, width: int) -> None:
    data = compared(models, "one.onnx", "two.onnx", "broken.onnx")
    console = Console(width=width, file=(target := open(os.devnull, "w")), record=True, highlight=False)  # noqa: PTH123, SIM115
    sidebyside.show(data, console=console)
    target.close()
    lines = console.export_text().splitlines()
    table = [line for line in lines if line.startswith(("model", "one.onnx", "two.onnx")) and "could not" not in line]
    assert all(len(line.rstrip()) <= width for line in table)
    assert any(line.split()[:1] == ["two.onnx"] and "×" in line for line in table)
    assert any("first run" in line for line in table) is (width == 200)
    assert sum("broken.onnx could not be compared" in line for line in lines) == 1


def cli(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnx_lowrank", "compare", *words]
    known = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=200, check=False)


def test_a_gate_against_an_earlier_comparison(models: Path) -> None:
    first = cli(models, "one.onnx", "two.onnx", "--brief", "--report", "old.json")
    assert first.returncode == 0, first.stderr
    assert "\x1b" not in first.stdout
    old = json.loads((models / "old.json").read_text())
    old["models"][1]["loss"] = 1e-5
    (models / "better.json").write_text(json.dumps(old))
    done = cli(models, "one.onnx", "two.onnx", "--brief", "--baseline", "better.json", "--max-regression", "9", "-q")
    assert done.returncode == 0, done.stderr  # 1e-4 is nine times worse than 1e-5, and no more
    words = ["one.onnx", "two.onnx", "--brief", "--baseline", "better.json", "--max-regression", "8", "--json"]
    worse = cli(models, *words)
    assert worse.returncode == 3
    assert worse.stderr.startswith("error: worse than better.json by more than 800 %: loss of two.onnx")
    rows = json.loads(worse.stdout)["change"]["rows"]
    assert [r["judged"] for r in rows if r["what"] == "loss" and r["model"] == "two.onnx"] == ["worse"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["one.onnx", "two.onnx", "--baseline", "none.json"], "none.json"),
        (["one.onnx", "two.onnx", "--baseline", "one.onnx"], "no comparison can be read"),
        (["one.onnx", "two.onnx", "--max-regression", "0.1"], "needs --baseline"),
        (["one.onnx", "two.onnx", "--threads", "1,x"], "list of numbers"),
        (["one.onnx", "two.onnx", "--threads", "0"], "threads is 0"),
        (["one.onnx", "two.onnx", "--streams", "0"], "streams is 0"),
        (["one.onnx", "two.onnx", "--provider", "gpuu"], "gpuu"),
        (["one.onnx", "broken.onnx", "--brief"], "fewer than two"),
    ],
)
def test_bad_usage_is_one_line(models: Path, words: list[str], says: str) -> None:
    done = cli(models, *words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def slower(data: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same comparison on a machine that takes `factor` times as long."""
    found = copy.deepcopy(data)
    for row in found["models"]:
        for entry in (row["latency"], *row["latencies"]):
            for side in ("before", "after"):
                if entry:
                    entry[side]["p50_ms"] *= factor
    return found


def judged(change: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(row["model"], row["what"]): row["judged"] for row in change["rows"]}


@pytest.fixture(scope="module")
def pair(models: Path) -> dict[str, Any]:
    return compared(models, "one.onnx", "two.onnx", brief=True)


def test_with_the_same_baseline_a_slow_day_is_not_judged(pair: dict[str, Any]) -> None:
    found = regressions.change(slower(pair, 1.5), pair, against="old.json", limit=0.05)
    assert judged(found) == {
        ("one.onnx", "p50 ms"): "not judged",
        ("two.onnx", "p50 ms"): "not judged",
        ("two.onnx", "speed-up"): "held",
        ("one.onnx", "loss"): "held",
        ("two.onnx", "loss"): "held",
    }
    assert next(r for r in found["rows"] if r["what"] == "p50 ms")["worse_by"] == pytest.approx(0.5)
    regressions.require(found)


def test_a_lower_speedup_fails(pair: dict[str, Any]) -> None:
    now = copy.deepcopy(pair)
    now["models"][1]["latency"]["ratio"] /= 1.06
    found = regressions.change(now, pair, against="old.json", limit=0.05)
    assert judged(found)[("two.onnx", "speed-up")] == "worse"
    with pytest.raises(RequirementError, match=r"speed-up of two\.onnx"):
        regressions.require(found)
    regressions.require(regressions.change(now, pair, against="old.json", limit=0.07))


def test_with_another_baseline_file_medians_are_judged(pair: dict[str, Any]) -> None:
    old = copy.deepcopy(pair)
    old["models"][0]["sha256"] = "another"
    found = regressions.change(slower(pair, 1.5), old, against="old.json", limit=0.05)
    assert judged(found)[("two.onnx", "p50 ms")] == judged(found)[("one.onnx", "p50 ms")] == "worse"


def test_a_loss_that_is_no_longer_finite_fails(pair: dict[str, Any]) -> None:
    now = copy.deepcopy(pair)
    now["models"][1]["loss"] = None
    found = regressions.change(now, pair, against="old.json", limit=0.05)
    assert judged(found)[("two.onnx", "loss")] == "worse"
    page = html({**now, "change": found})
    assert "Since old.json" in page
    for cells, row in zip(Page(page).rows("change"), found["rows"], strict=True):
        for cell, key in zip(cells[3:6], ("before", "now", "worse_by"), strict=True):
            check(cell, row[key])


def test_a_users_metric_is_the_loss_of_the_page(models: Path) -> None:
    (models / "mine.py").write_text("def gap(y, z):\n    return float(abs(y['y'] - z['y']).max())\n")
    data = compared(models, "one.onnx", "two.onnx", metric=f"{models / 'mine.py'}:gap", brief=True)
    assert data["metric"].endswith("mine.py:gap")
    assert data["models"][1]["loss"] > 0
    assert data["models"][1]["loss"] == pytest.approx(np.mean(data["models"][1]["sample_losses"]))
    page = html(data)
    assert "Σ‖y − ŷ‖²" not in page
    assert "mine.py:gap" in page


def test_another_machine_is_a_warning(pair: dict[str, Any]) -> None:
    old = copy.deepcopy(pair)
    old["environment"]["processor"] = "Abacus"
    found = regressions.change(pair, old, against="old.json", limit=0.05)
    assert any("Abacus" in warning for warning in found["warnings"])


def test_a_report_of_something_else_is_refused(tmp_path: Path, written: dict[str, Written]) -> None:
    (tmp_path / "r.json").write_text(json.dumps(written["optimize"].data))
    with pytest.raises(SettingsError, match="no comparison"):
        regressions.read(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.onnx", "b/y.onnx"], ["x.onnx", "y.onnx"]),
        (["a/x.onnx", "b/x.onnx"], ["a/x.onnx", "b/x.onnx"]),
        (["a/x.onnx", "b/y.onnx", "a/x.onnx"], ["x.onnx (1)", "y.onnx", "x.onnx (3)"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert file_names(paths) == names


def test_progress_is_told(models: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    note: Callable[[str, int, int], None] = lambda *step: seen.append(step)  # noqa: E731
    compared(models, "one.onnx", "two.onnx", brief=True, progress=note)
    assert seen[0] == ("compare", 0, 4)
    assert ("race", 1, 1) in seen
