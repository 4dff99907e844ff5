"""A model that must gain, and reports of real runs of the command line on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

hypothesis.settings.register_profile("busy", deadline=None)  # no test may fail because the machine is busy
hypothesis.settings.load_profile("busy")


@dataclass(frozen=True)
class Written:
    """What `--json` printed and what `--report` wrote in one run."""

    data: dict[str, Any]
    text: str
    path: Path


def save_low_rank_model(path: Path, layers: int = 3, width: int = 512) -> None:
    """Dense layers of exact rank 16 behind ReLUs, a case where low rank must win, with samples beside it."""
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    for i in range(layers):
        w = rng.standard_normal((width, 16)) @ rng.standard_normal((16, width)) / width
        tensors.append(numpy_helper.from_array(w.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"t{i}"], name=f"/encoder/layer.{i}/MatMul"))
        nodes.append(helper.make_node("Relu", [f"t{i}"], [f"y{i}"]))
        name = f"y{i}"
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", width])
    y = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width])
    graph = helper.make_graph(nodes, "wide", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(path.with_suffix(".npz"), x=rng.standard_normal((16, 64, width)).astype(np.float32))


@pytest.fixture(scope="session")
def low_rank_model() -> Callable[..., None]:
    """Saves a model of exact rank 16, and its samples: (path, layers, width)."""
    return save_low_rank_model


def _run(folder: Path, report: str, *words: str) -> Written:
    command = [sys.executable, "-m", "onnx_lowrank", *words, "--data", "wide.npz", "--json", "--report", report]
    environment = {**os.environ, "ONNX_LOWRANK_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    path = folder / report
    return Written(json.loads(done.stdout), path.read_text(encoding="utf-8"), path)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """One run of each command, by command."""
    folder = tmp_path_factory.mktemp("reports")
    save_low_rank_model(folder / "wide.onnx")
    return {
        "optimize": _run(folder, "optimize.html", "optimize", "wide.onnx", "-o", "thin.onnx"),
        "analyze": _run(folder, "analyze.md", "analyze", "wide.onnx"),
        "compare": _run(folder, "compare.html", "compare", "wide.onnx", "thin.onnx", "wide.onnx"),
    }
