"""A limit that is held by what the samples surely show: fewer samples that say less give a milder plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnx_lowrank
from onnx_lowrank.errors import SettingsError
from tests.saved import save_table

WIDTH, RANK, SAMPLES = 128, 16, 32
HEAVY = SAMPLES - 1
"""The one held-out sample that reads what rank 16 leaves out; a third of the others (calibration) do too."""

TEXT = f"""<ir_version: 8, opset_import: ["" : 17]>
m (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y) {{ y = MatMul(x, w) }}"""
ROW = {"dense": 0.050, "dense again": 0.0502, "svd 16": 0.010, "svd 32": 0.020, "svd 64": 0.060}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight of rank 32 whose second half of directions matters to few samples."""
    folder, rng = tmp_path_factory.mktemp("confidence"), np.random.default_rng(3)
    inputs, outputs = (np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0][: 2 * RANK] for _ in range(2))
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(numpy_helper.from_array((inputs.T @ outputs).astype(np.float32), "w"))
    onnx.save(model, folder / "m.onnx")
    parts = rng.standard_normal((SAMPLES, 64, 2 * RANK))
    seldom = np.array([i == HEAVY or i % 4 == 0 for i in range(SAMPLES)])
    parts[:, :, RANK:] *= np.where(seldom, 0.25, 0.01)[:, None, None]
    np.savez(folder / "x.npz", x=(parts @ inputs).astype(np.float32).reshape(-1, 64, WIDTH))
    save_table(folder / "t.json", WIDTH, row=ROW)
    return folder


def optimize(home: Path, **choices: Any) -> onnx_lowrank.Report:
    given = {"data": str(home / "x.npz"), "cache": home / "t.json", "verify_latency": False, "kinds": ("svd",)}
    return onnx_lowrank.optimize(home / "m.onnx", home / "out.onnx", **{**given, "refit": False, **choices})


def test_the_measured_loss_holds_the_limit_by_default(home: Path) -> None:
    report = optimize(home)
    verdict = report.verdict
    assert [d.rank for d in report.plan.decisions] == [RANK]
    assert verdict.loss <= 0.01 < 0.015 < (verdict.loss_upper or 0)
    assert f"(below {verdict.loss_upper:.2g} with 95 % confidence)" in verdict.sentence()
    assert any("8 held-out samples differ much" in warning for warning in report.warnings)
    told = report.to_dict()["verdict"]
    assert (told["loss_upper"], told["confidence"]) == (verdict.loss_upper, 0.5)


def test_with_confidence_the_upper_end_holds_it(home: Path) -> None:
    report = optimize(home, confidence=0.95)
    assert [d.rank for d in report.plan.decisions] == [2 * RANK]
    assert (report.verdict.loss_upper or 1) <= 0.01
    assert not any("differ much" in warning for warning in report.warnings)


def test_a_model_that_is_left_has_no_upper_end(home: Path) -> None:
    report = optimize(home, confidence=0.95, exclude=("*",))
    assert not report
    assert report.verdict.loss_upper is None


def test_one_held_out_sample_says_nothing_about_others(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"confidence 0\.95 needs two held-out samples"):
        optimize(home, confidence=0.95, samples=3)
