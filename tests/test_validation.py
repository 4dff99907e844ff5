"""The relative loss by hand, and references that stay on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnx_lowrank.metrics import RelativeLoss, UserLoss, new_loss
from onnx_lowrank.runtime import Session
from onnx_lowrank.validation import References, standard_error, upper_end

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


def samples(count: int, *, seed: int) -> list[tuple[list[Any], list[Any]]]:
    """Two outputs of very different power, with errors that differ from sample to sample."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        small, large = rng.standard_normal(8), 100 * rng.standard_normal(3)
        moved = [small + 0.1 * rng.standard_normal(8), large * (1 + 0.1 * rng.uniform(0.5, 2.0))]
        found.append(([small, large], moved))
    return found


def test_the_error_of_equal_powers_is_that_of_a_mean() -> None:
    parts = [0.1, 0.3, 0.2, 0.6, 0.3]
    counted = loss(*[([[1.0]], [[1.0 + part]]) for part in parts])
    squares = np.square(parts)
    assert standard_error(counted) == pytest.approx(squares.std(ddof=1) / math.sqrt(5))
    mean = UserLoss(lambda a, b: float(np.square(b["y"] - a["y"])[0]), "f", ["y"])
    cosine = new_loss("top1", ["y"], {})(["y"])
    for i, part in enumerate(parts):
        mean.add([np.ones(1)], [np.ones(1) + part])
        cosine.add([np.eye(2)[:1]], [np.eye(2)[i % 2 :][:1]])
    assert standard_error(mean) == pytest.approx(standard_error(counted))
    assert standard_error(cosine) == pytest.approx(np.std([0, 1, 0, 1, 0], ddof=1) / math.sqrt(5))


def test_the_error_is_the_spread_over_other_samples() -> None:
    """The truth: the loss of many draws of forty samples."""
    counted = [loss(*samples(40, seed=seed)) for seed in range(300)]
    spread = np.std([one.value() for one in counted], ddof=1)
    assert np.mean([standard_error(one) for one in counted]) == pytest.approx(spread, rel=0.15)


def test_the_upper_end_covers_as_often_as_it_says() -> None:
    truth = loss(*samples(20000, seed=1000)).value()
    covered = [upper_end(loss(*samples(30, seed=seed)), 0.95) >= truth for seed in range(300)]
    assert 0.88 <= np.mean(covered) <= 0.99
    one = loss(*samples(30, seed=0))
    assert upper_end(one, 0.5) == one.value() < upper_end(one, 0.8) < upper_end(one, 0.95)


def losses(values: Iterable[float]) -> RelativeLoss:
    """Of samples that lose so much each, of equal power."""
    return loss(*[([[1.0]], [[1.0 + math.sqrt(value)]]) for value in values])


def test_the_upper_end_of_symmetric_losses_is_students() -> None:
    even = losses([0.01, 0.02, 0.03, 0.04, 0.05])
    assert upper_end(even, 0.95) == pytest.approx(0.03 + 2.131847 * math.sqrt(0.00025 / 5))  # t of 4 degrees of freedom
    few_are_small = losses([0.05, 0.05, 0.05, 0.05, 0.01])
    assert upper_end(few_are_small, 0.95) == pytest.approx(0.042 + 2.131847 * math.sqrt(0.00032 / 5))
    nearly_even = losses([0.01, 0.02, 0.03, 0.04, 0.05 + 1e-5])
    assert upper_end(nearly_even, 0.95) == pytest.approx(upper_end(even, 0.95), abs=1e-5)


def test_the_upper_end_of_skewed_losses_covers_too() -> None:
    """Losses of which a few are large: Student's interval of 48 covers their mean, which is known, too seldom."""
    rng = np.random.default_rng(0)
    drawn = [losses(rng.gamma(0.3, 0.01, 48)) for _ in range(600)]
    student = [one.value() + 1.677927 * standard_error(one) >= 0.003 for one in drawn]
    covered = [upper_end(one, 0.95) >= 0.003 for one in drawn]
    assert np.mean(student) < 0.9 < 0.91 <= np.mean(covered) <= 0.98


def test_what_one_sample_or_a_broken_output_says_is_unsure() -> None:
    assert standard_error(loss(([[1.0]], [[1.1]]))) == math.inf
    assert upper_end(loss(([[1.0]], [[1.1]])), 0.5) == pytest.approx(0.01)
    assert upper_end(loss(([[1.0]], [[1.1]])), 0.95) == math.inf
    broken = loss(([[1.0]], [[math.inf]]), ([[1.0]], [[1.0]]))
    assert standard_error(broken) == math.inf
    assert upper_end(broken, 0.95) == math.inf
    same = loss(([[0.0]], [[0.0]]), ([[0.0]], [[0.0]]))
    assert (standard_error(same), upper_end(same, 0.95)) == (0.0, 0.0)


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
