"""Metrics on outputs whose loss is known by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.errors import DataError, SettingsError
from onnx_lowrank.metrics import new_loss
from onnx_lowrank.validation import Loss

LOGITS = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], np.float32)


def loss_of(metric: str, reference: list[Any], outputs: list[Any], weights: dict[str, float] | None = None) -> Loss:
    names = [f"y{i}" for i in range(len(reference))]
    counted = new_loss(metric, names, weights or {})(names)
    counted.add(reference, outputs)
    return counted


@pytest.mark.parametrize("metric", ["relative", "cosine", "top1", "kl"])
def test_equal_outputs_have_no_loss(metric: str) -> None:
    assert loss_of(metric, [LOGITS], [LOGITS]).value() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("metric", ["relative", "cosine", "top1", "kl"])
@pytest.mark.parametrize("other", [np.full_like(LOGITS, np.nan), LOGITS[:1]])
def test_broken_outputs_are_infinitely_far(metric: str, other: Any) -> None:
    assert loss_of(metric, [LOGITS], [other]).value() == math.inf


def test_relative_is_error_over_power() -> None:
    assert loss_of("relative", [LOGITS], [LOGITS * 1.1]).value() == pytest.approx(0.01, rel=1e-5)


def test_cosine_does_not_see_the_length() -> None:
    assert loss_of("cosine", [LOGITS], [LOGITS * 7]).value() == pytest.approx(0.0, abs=1e-12)
    assert loss_of("cosine", [np.array([1.0, 0.0])], [np.array([0.0, 1.0])]).value() == pytest.approx(1.0)
    assert loss_of("cosine", [np.zeros(2)], [np.ones(2)]).value() == 1.0


def test_top1_counts_rows_whose_largest_entry_moved() -> None:
    assert loss_of("top1", [LOGITS], [LOGITS[::-1]]).value() == 1.0
    assert loss_of("top1", [LOGITS], [np.stack([LOGITS[0], LOGITS[0]])]).value() == 0.5


def test_kl_takes_logits_and_probabilities() -> None:
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    q = np.full_like(p, 1 / 3)
    expected = float(np.mean(np.sum(p * np.log(p / q), axis=-1)))
    assert loss_of("kl", [LOGITS], [np.zeros_like(LOGITS)]).value() == pytest.approx(expected, rel=1e-6)
    assert loss_of("kl", [p], [q]).value() == pytest.approx(expected, rel=1e-6)


def test_outputs_are_weighted() -> None:
    pair = [LOGITS, LOGITS], [LOGITS * 1.1, LOGITS]
    assert loss_of("relative", *pair).value() == pytest.approx(0.005, rel=1e-5)
    assert loss_of("relative", *pair, {"y1": 3.0}).value() == pytest.approx(0.0025, rel=1e-5)
    assert loss_of("cosine", [LOGITS, LOGITS], [-LOGITS, LOGITS], {"y0": 0.0}).value() == pytest.approx(0.0, abs=1e-9)


def test_a_weight_for_no_output_is_refused() -> None:
    with pytest.raises(SettingsError, match="no output 'z'"):
        new_loss("relative", ["y"], {"z": 1.0})


def test_the_users_function_gets_dicts(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def far(a, b):\n    return abs(a['y0'] - b['y0']).max()\n")
    assert loss_of(f"{tmp_path}/m.py:far", [LOGITS], [LOGITS + 0.5]).value() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("code", "says"), [("1 / 0", "ZeroDivisionError"), ("float('nan')", "NaN"), ("'much'", "ValueError")]
)
def test_a_users_function_that_fails_is_one_line(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "m.py").write_text(f"def far(a, b):\n    return {code}\n")
    with pytest.raises(DataError, match=says):
        loss_of(f"{tmp_path}/m.py:far", [LOGITS], [LOGITS])


def test_the_worst_sample_is_known() -> None:
    counted = new_loss("relative", ["y"], {})(["y"])
    for scale in (1.0, 1.2, 1.1):
        counted.add([LOGITS], [LOGITS * scale])
    assert int(np.argmax(counted.per_sample)) == 1
