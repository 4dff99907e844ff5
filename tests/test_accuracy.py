"""Distances of outputs against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.accuracy import OutputDistance, agreement, looks_like_classes


def row(*pairs: tuple[list[float], list[float]], name: str = "y", dtype: type = np.float32) -> dict[str, float | None]:
    found = OutputDistance(name)
    for y, other in pairs:
        found.add(np.array(y, dtype), np.array(other, dtype))
    return found.row()


def test_figures_by_hand() -> None:
    found = row(([1.0, -2.0, 4.0], [1.0, -2.5, 4.0]), ([0.5, 0.0, 0.0], [0.25, 0.0, 0.0]))
    assert found["samples"] == 2
    assert found["tolerance_abs"] == 0.5
    assert found["tolerance_rel"] == 0.5  # 0.25 of 0.5
    assert found["tolerance_of_peak"] == 0.5 / 4
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(21.25 / 0.3125))
    assert found["cosine"] == pytest.approx(22.125 / np.sqrt(21.25 * (1 + 6.25 + 16 + 0.0625)))
    assert (found["worst_sample"], found["worst_loss"]) == (1, 0.25)
    assert found["differing"] == pytest.approx(2 / 6)


def test_equal_outputs_have_no_ratio_of_noise() -> None:
    found = row(([1.0, 2.0], [1.0, 2.0]))
    assert found["sqnr_db"] is None
    assert (found["tolerance_abs"], found["tolerance_rel"], found["cosine"], found["worst_loss"]) == (0, 0, 1, 0)


def test_what_is_infinite_is_null() -> None:
    found = row(([0.0, 1.0], [1e-3, float("nan")]))
    assert found["tolerance_rel"] is None
    assert found["tolerance_abs"] is None
    assert found["worst_loss"] is None
    assert found["worst_sample"] == 0


def test_entries_that_are_not_finite_in_the_original_are_left_out() -> None:
    assert row(([float("-inf"), 1.0], [0.0, 1.0]))["tolerance_abs"] == 0


def test_another_shape_or_kind_counts_as_different() -> None:
    found = OutputDistance("y")
    found.add(np.ones((2, 2), np.float32), np.ones(4, np.float32))
    found.add(np.array(["a"], object), np.array(["a"], object))
    assert found.row() == {"output": "y", "samples": 2, "differing": 0.5}


def test_agreement_of_the_largest_and_of_five() -> None:
    y = np.zeros((3, 8))
    y[:, 2] = 1
    z = np.tile(np.arange(8.0), (3, 1))  # the five largest are 3 to 7
    z[0, 2] = 9
    z[1, 2] = 4.5
    assert agreement(y, z) == (3, 1, 2)
    assert agreement(y[:, :4], z[:, :4]) == (3, 2, -1)


@pytest.mark.parametrize(
    ("name", "values", "answer"),
    [
        ("out", np.full((1, 4), 0.25), True),
        ("out", np.full((2, 7, 4), 0.25), True),
        ("out", np.arange(12.0).reshape(3, 4), True),
        ("embedding", np.full((1, 4), 0.5), False),  # of length one
        ("last_hidden_state", np.arange(24.0).reshape(2, 3, 4), False),
        ("logits", np.arange(24.0).reshape(2, 3, 4), True),
        ("logits", np.arange(4.0), False),
        ("map", np.ones((1, 1, 4, 4)), False),
    ],
)
def test_outputs_that_look_like_classes(name: str, values: np.ndarray, answer: bool) -> None:
    assert looks_like_classes(name, values) is answer
