"""Files that are written beside OUT: refused before the work where they cannot be, or would cost something else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lowrank
from onnx_lowrank import output
from onnx_lowrank.errors import SettingsError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a data file, an OUT, a plan, samples and a table; the current folder."""
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 32]) for n in "xy"]
    tensors = [numpy_helper.from_array(np.ones((32, 32), np.float32), "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.json", size_threshold=0)
    for name in ("out.onnx", "plan.json", "x.npz", "table.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(match: str, written: dict[str, str], *inputs: str, linked: Callable[[str, str], Any] | None = None) -> None:
    if linked is not None:
        taken = written["--plan-out"]
        linked(taken, "link.json")
        written = {**written, "--plan-out": "link.json"}
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(SettingsError, match=match) as caught:
        output.check({option: Path(path) for option, path in written.items()}, [Path("m.onnx")], inputs)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("linked", [None, os.symlink, os.link])
@pytest.mark.parametrize("path", ["m.onnx", "weights.json", "plan.json", "x.npz", "table.json"])
def test_what_is_read_is_not_written_over(path: str, linked: Any) -> None:
    given = ("plan.json", "x:x.npz", Path("table.json"))
    refused(r"--plan-out '.*' is a file that this run reads", {"--plan-out": path}, *map(str, given), linked=linked)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("linked", [None, os.symlink, os.link])
def test_two_outputs_are_two_files(linked: Any) -> None:
    both = {"--output": "out.onnx", "--plan-out": "out.onnx"}
    refused("--output and --plan-out are both 'out.onnx'", both, linked=linked)
    refused("--report and --plan-out are both", {"--report": "new.json", "--plan-out": "./new.json"})
    refused("--keep-fp32 and --plan-out are both", {"--keep-fp32": "k.onnx", "--plan-out": "k.onnx"})


def test_an_output_is_no_other_input(home: Path) -> None:
    refused("--output 'weights.json' is a file that this run reads", {"--output": "weights.json"})
    refused("--output 'plan.json' is a file that this run reads", {"--output": "plan.json"}, str(home / "plan.json"))
    output.check({"--output": Path("m.onnx")}, [Path("m.onnx")])  # in place, or refused elsewhere


@pytest.mark.usefixtures("home")
def test_a_place_where_nothing_can_be_written_is_refused() -> None:
    refused(r"/proc/p.json: cannot be written there \(", {"--plan-out": "/proc/p.json"})
    refused("cannot be written there .File name too long", {"--plan-out": "p" * 256})
    refused("is a device or a pipe", {"--plan-out": "/dev/null"})
    refused("in a folder that exists", {"--plan-out": "none/p.json"})
    output.check({"--plan-out": Path("plan.json"), "--report": Path("r.json"), "--output": Path("out.onnx")})
    assert {p.name for p in Path().iterdir()} == {
        "m.onnx", "out.onnx", "plan.json", "table.json", "weights.json", "x.npz"
    }  # fmt: skip


def test_a_float32_model_that_cannot_be_written_is_refused_before_the_work(home: Path) -> None:
    before = (home / "m.onnx").read_bytes()
    for path in ("/proc/k.onnx", "out.onnx", "m.onnx", "weights.json"):
        with pytest.raises(SettingsError, match=r"not writable|is the output itself|is the input model|is a data file"):
            onnx_lowrank.optimize(
                "m.onnx", "new.onnx" if path != "out.onnx" else path, keep_fp32=path, precision="fp16"
            )
    assert (home / "m.onnx").read_bytes() == before
    assert not (home / "new.onnx").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["optimize", "m.onnx", "-o", "out.onnx", "--plan-out", "out.onnx"],
        ["optimize", "m.onnx", "-o", "out.onnx", "--report", "weights.json"],
        ["optimize", "m.onnx", "-o", "out.onnx", "--plan-out", "/proc/p.json"],
        ["analyze", "m.onnx", "--plan-out", "m.onnx"],
        ["apply", "plan.json", "m.onnx", "-o", "out.onnx", "--report", "plan.json"],
        ["compare", "m.onnx", "--report", "weights.json"],
        ["sweep", "m.onnx", "-o", "swept", "--report", "weights.json"],
    ],
)
def test_every_command_says_so_in_one_line(home: Path, words: list[str]) -> None:
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    command = [sys.executable, "-m", "onnx_lowrank", *words]
    environment = {**os.environ, "ONNX_LOWRANK_CACHE": str(home / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
