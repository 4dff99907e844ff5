"""The relative loss by hand, and references that stay on disk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnx_lowrank.metrics import RelativeLoss
from onnx_lowrank.runtime import Session
from onnx_lowrank.validation import References

TWO = """<ir_version: 8, opset_import: ["" : 17]>
two (float[n, 2] x) => (float[n, 2] y, float[n, 2] z) <float[1] s = {SCALE}> { y = Mul(x, s)  z = Identity(x) }"""
SWAPPED = TWO.replace("float[n, 2] y, float[n, 2] z", "float[n, 2] z, float[n, 2] y")


def session(text: str, scale: float) -> Session:
    return Session(onnx.parser.parse_model(text.replace("SCALE", str(scale))))


def loss(*pairs: tuple[list[Any], list[Any]]) -> RelativeLoss:
    counted = RelativeLoss()
    for reference, outputs in pairs:
        counted.add([np.asarray(y) for y in reference], [np.asarray(y) for y in outputs])
    return counted


def test_errors_and_powers_are_summed_before_they_are_divided() -> None:
    found = loss(([[3.0, 4.0]], [[3.0, 3.0]]), ([[0.0, 5.0]], [[0.0, 5.0]]))
    assert found.value() == pytest.approx(1 / 50)
    assert found.per_sample == pytest.approx([1 / 25, 0.0])


def test_outputs_are_averaged() -> None:
    assert loss(([[2.0], [1.0]], [[1.0], [1.0]])).value() == pytest.approx(0.125)


def test_integers_count_what_differs() -> None:
    assert loss(([[1, 2, 3, 4]], [[1, 2, 0, 0]])).value() == 0.5


@pytest.mark.parametrize("other", [[[math.nan]], [[math.inf]], [[1.0, 2.0]]])
def test_what_is_not_finite_or_of_another_shape_is_infinite(other: list[Any]) -> None:
    assert loss(([[1.0]], other)).value() == math.inf


def test_an_output_of_zeros_must_stay_so() -> None:
    assert loss(([[0.0]], [[0.0]])).value() == 0.0
    assert loss(([[0.0]], [[1e-9]])).value() == math.inf


def test_entries_that_the_original_has_not_finite_do_not_count() -> None:
    assert loss(([[math.inf, 2.0]], [[0.0, 1.0]])).value() == pytest.approx(0.25)


def test_no_samples_no_loss() -> None:
    assert RelativeLoss().value() == 0.0


def test_references_are_those_of_the_original_by_name() -> None:
    samples = [{"x": np.full((1, 2), i, np.float32)} for i in (1, 2, 3)]
    references = References(session(TWO, 2.0), samples, RelativeLoss)
    assert references.count == 3
    assert references.loss(session(TWO, 2.0)).value() == 0.0
    assert references.loss(session(SWAPPED, 2.0)).value() == 0.0
    assert references.loss(session(TWO, 1.0)).value() == pytest.approx((0.25 + 0.0) / 2)
    for (feed, outputs), sample in zip(references, samples, strict=True):
        assert feed == sample
        np.testing.assert_array_equal(outputs[0], 2 * sample["x"])
