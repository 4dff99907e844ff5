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
from onnx_lowrank.data import held_out
from onnx_lowrank.errors import SettingsError, VerificationError
from onnx_lowrank.plan import Plan
from tests.saved import save_table

WIDTH, RANK, SAMPLES = 128, 16, 32
APART = [i for i in range(SAMPLES) if held_out(i)]
"""The one of them that comes last reads what rank 16 leaves out; a third of the others (calibration) do too."""

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
    others = [i for i in range(SAMPLES) if i not in APART]
    seldom = np.isin(np.arange(SAMPLES), [APART[-1], *others[::3]])
    parts[:, :, RANK:] *= np.where(seldom, 0.25, 0.01)[:, None, None]
    np.savez(folder / "x.npz", x=(parts @ inputs).astype(np.float32).reshape(-1, 64, WIDTH))
    save_table(folder / "t.json", WIDTH, row=ROW)
    return folder


def optimize(home: Path, **choices: Any) -> onnx_lowrank.Report:
    given: dict[str, Any] = {
        "data": str(home / "x.npz"),
        "cache": home / "t.json",
        "verify_latency": False,
        "kinds": ("svd",),
    }
    return onnx_lowrank.optimize(home / "m.onnx", home / "out.onnx", **{**given, "refit": False, **choices})


def test_without_confidence_the_measured_loss_holds_the_limit(home: Path) -> None:
    report = optimize(home, confidence=0.5)
    verdict = report.verdict
    assert [d.rank for d in report.plan.decisions] == [RANK]
    assert verdict.loss <= 0.01 < 0.015 < (verdict.loss_upper or 0)
    assert f"(below {verdict.loss_upper:.2g} with 95 % confidence)" in verdict.sentence()
    assert any("8 held-out samples differ much" in warning for warning in report.warnings)
    told = report.to_dict()["verdict"]
    assert (told["loss_upper"], told["confidence"]) == (verdict.loss_upper, 0.5)


def test_by_default_the_upper_end_holds_it(home: Path) -> None:
    report = optimize(home)
    assert [d.rank for d in report.plan.decisions] == [2 * RANK]
    assert (report.verdict.loss_upper or 1) <= 0.01
    assert not any("differ much" in warning for warning in report.warnings)


def test_what_the_fitted_samples_lose_counts_too(home: Path) -> None:
    """Of those held out none reads what rank 16 leaves out, a third of the others do: a plan that was lucky."""
    with np.load(home / "x.npz") as data:
        x = data["x"].reshape(SAMPLES, 64, WIDTH).copy()
    x[APART[-1]] = x[APART[0]]
    np.savez(home / "lucky.npz", x=x)
    lucky = optimize(home, data=str(home / "lucky.npz"), confidence=0.5)
    assert [d.rank for d in lucky.plan.decisions] == [RANK]
    assert (lucky.verdict.loss_upper or 1) <= 0.01
    report = optimize(home, data=str(home / "lucky.npz"))
    assert [d.rank for d in report.plan.decisions] == [2 * RANK]


def test_a_model_that_is_left_has_no_upper_end(home: Path) -> None:
    report = optimize(home, exclude=("*",))
    assert not report
    assert report.verdict.loss_upper is None


def test_a_plan_is_replayed_as_sure_as_it_was_made(home: Path) -> None:
    """Rank 16 holds on average only: by default its replay would be refused."""
    plan = optimize(home, confidence=0.5).plan
    assert Plan.from_json(plan.to_json()).confidence == 0.5
    given: dict[str, Any] = {"data": str(home / "x.npz"), "cache": home / "t.json", "verify_latency": False}
    assert onnx_lowrank.apply(plan, home / "m.onnx", home / "again.onnx", **given).verdict.confidence == 0.5
    with pytest.raises(VerificationError, match="with 95 % confidence"):
        onnx_lowrank.apply(plan, home / "m.onnx", home / "again.onnx", confidence=0.95, **given)


def test_each_limit_of_a_sweep_is_held_so(home: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "data": str(home / "x.npz"),
        "cache": home / "t.json",
        "verify_latency": False,
        "kinds": ("svd",),
    }
    reports = onnx_lowrank.sweep(home / "m.onnx", tmp_path, losses=(0.01, 0.1), refit=False, **given)
    assert [[d.rank for d in report.plan.decisions] for report in reports] == [[2 * RANK], [RANK]]
    assert all((report.verdict.loss_upper or 1) <= (report.verdict.loss_limit or 0) for report in reports)


def test_one_held_out_sample_does_not_tell_what_others_lose(home: Path) -> None:
    report = optimize(home, samples=3)
    assert report.verdict.confidence == 0.5
    assert any("one held-out sample does not tell" in warning for warning in report.warnings)
    with pytest.raises(SettingsError, match=r"confidence 0\.95 needs two held-out samples"):
        optimize(home, confidence=0.95, samples=3)
