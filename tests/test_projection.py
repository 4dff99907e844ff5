"""One projection for several weights: the errors are those of its definition, and no other projection has less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.linalg import Array, Metric, factor_input
from onnx_lowrank.projection import Projection, projection

INPUTS, OUTPUTS = 9, (6, 9, 4)


def moment(rng: np.random.Generator, width: int = INPUTS) -> Array:
    x = rng.standard_normal((300, width)) @ rng.standard_normal((width, width))
    return np.asarray(x.T @ x / len(x))


def weights(rng: np.random.Generator) -> list[Array]:
    return [rng.standard_normal((count, INPUTS)) * scale for count, scale in zip(OUTPUTS, (1, 30, 0.01), strict=True)]


def defined(found: Projection, weight: Array, metric: Metric | None, second: Array, rank: int) -> float:
    """`E|Wx − Ŵx|² / E|Wx|²` in the metric, from its definition."""
    root = np.eye(len(weight)) if metric is None else metric.root
    lost = root @ (weight - found.left(weight, rank) @ found.right(rank))
    return float(np.trace(lost @ second @ lost.T) / np.trace(root @ weight @ second @ weight.T @ root))


@given(st.integers(0, 2**16), st.booleans())
def test_the_errors_are_those_of_the_definition_and_fall_with_the_rank(seed: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    given_, second = weights(rng), moment(rng)
    metrics = [Metric.of(moment(rng, len(w)), 0.1) if weighted and i != 1 else None for i, w in enumerate(given_)]
    found = projection(given_, metrics, second, np.zeros(INPUTS))
    for site, (weight, metric) in enumerate(zip(given_, metrics, strict=True)):
        errors = [found.relative(site, rank) for rank in range(1, INPUTS + 1)]
        expected = [defined(found, weight, metric, second, rank) for rank in range(1, INPUTS + 1)]
        assert errors == pytest.approx(expected, abs=1e-9)
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == 0


@given(st.integers(0, 2**16), st.integers(1, INPUTS - 1))
def test_the_sum_of_the_relative_errors_is_the_least_that_any_common_factor_has(seed: int, rank: int) -> None:
    """Eckart–Young for the stacked weights, each divided by the root of its output's power."""
    rng = np.random.default_rng(seed)
    given_, second = weights(rng), moment(rng)
    found = projection(given_, [None] * len(given_), second, np.zeros(INPUTS))
    scaled = [w / np.trace(w @ second @ w.T) ** 0.5 for w in given_]
    least = factor_input(np.concatenate(scaled), second).error(rank)
    assert sum(found.relative(site, rank) for site in range(3)) == pytest.approx(least, abs=1e-9)


def test_a_weight_on_its_own_gets_its_own_best_factors() -> None:
    rng = np.random.default_rng(0)
    weight, second = rng.standard_normal((7, INPUTS)), moment(rng)
    found = projection([weight], [None], second, np.zeros(INPUTS))
    own = factor_input(weight, second)
    left, right = own.pair(weight, 4)
    assert found.relative(0, 4) == pytest.approx(own.relative(4))
    assert found.left(weight, 4) @ found.right(4) == pytest.approx(left @ right, abs=1e-9)


def test_inputs_and_weights_without_power_are_no_error() -> None:
    rng = np.random.default_rng(0)
    given_, second = [np.zeros((4, INPUTS)), rng.standard_normal((5, INPUTS))], moment(rng)
    second[2] = second[:, 2] = 0
    found = projection(given_, [None, None], second, np.zeros(INPUTS))
    assert np.isfinite(found.write).all()
    assert [found.relative(0, rank) for rank in (0, 1)] == pytest.approx([0, 0], abs=1e-25)
    assert found.relative(1, 5) == pytest.approx(0, abs=1e-9)
    nothing = projection(given_, [None, None], np.zeros_like(second), np.zeros(INPUTS))
    assert not nothing.left(given_[1], 3).any()
