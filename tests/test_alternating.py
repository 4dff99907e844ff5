"""Alternating least squares: never worse, exact where theory says so, and the same optimum as a dense solver."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from onnx_lowrank.alternating import alternated, best_second
from onnx_lowrank.separable import nested_least_squares, separable

Array = npt.NDArray[np.float64]
OUTPUTS, COLUMNS, WIDTH = 14, 10, 3


def problem(seed: int = 0) -> tuple[Array, Array]:
    """Weight and a covariance with strong correlation between the columns of a patch."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((COLUMNS * WIDTH,) * 2) * np.geomspace(3, 0.1, COLUMNS * WIDTH)
    x = rng.standard_normal((500, COLUMNS * WIDTH)) @ mixed + rng.standard_normal((500, 1))
    return rng.standard_normal((OUTPUTS, COLUMNS * WIDTH)), np.cov(x.T, bias=True)


def error(weight: Array, covariance: Array, first: Array, rank: int = 0) -> float:
    """Relative error with the best second factor, from the definition."""
    square = covariance.reshape(COLUMNS, WIDTH, COLUMNS, WIDTH)
    second = best_second(first, square, (weight @ covariance).reshape(OUTPUTS, COLUMNS, WIDTH), rank)
    whole = np.einsum("nrj,rc->ncj", second.reshape(OUTPUTS, len(first), WIDTH), first).reshape(weight.shape)
    left = weight - whole
    return float(np.trace(left @ covariance @ left.T) / np.trace(weight @ covariance @ weight.T))


def start(weight: Array, covariance: Array, rank: int) -> Array:
    return separable(weight, covariance, np.zeros(COLUMNS * WIDTH), WIDTH, 10**6, rank).vertical


@pytest.mark.parametrize("inner", [2, 5])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_error_falls_from_sweep_to_sweep(inner: int, rank: int) -> None:
    weight, covariance = problem()
    first = start(weight, covariance, inner)
    errors = [error(weight, covariance, first, rank)]
    for _ in range(6):
        first = alternated(weight, covariance, first, WIDTH, rank, sweeps=1)
        errors.append(error(weight, covariance, first, rank))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


def test_a_step_of_the_first_factor_is_the_least_squares_solution() -> None:
    """Enough conjugate gradients reach what a dense solver finds for the same second factor."""
    weight, covariance = problem(1)
    first = start(weight, covariance, 3)
    square = covariance.reshape(COLUMNS, WIDTH, COLUMNS, WIDTH)
    second = best_second(first, square, (weight @ covariance).reshape(OUTPUTS, COLUMNS, WIDTH))
    by_rank = second.reshape(OUTPUTS, 3, WIDTH)
    root = np.linalg.cholesky(covariance)
    # y_n = Σ B[n,r,j] A[r,c] x[c,j]: one row for every output and every direction of x.
    design = np.einsum("nrj,cjd->ndrc", by_rank, root.reshape(COLUMNS, WIDTH, -1)).reshape(-1, 3 * COLUMNS)
    exact = np.linalg.lstsq(design, (weight @ root).reshape(-1), rcond=None)[0].reshape(3, COLUMNS)
    found = alternated(weight, covariance, first, WIDTH, sweeps=1, steps=60)
    assert np.abs(found - exact).max() <= 1e-3 * np.abs(exact).max()  # products in float32


def test_a_weight_that_has_the_form_is_found_from_a_start_beside_it() -> None:
    weight, covariance = problem(2)
    rng = np.random.default_rng(5)
    first = rng.standard_normal((2, COLUMNS))
    weight = np.einsum("nrj,rc->ncj", rng.standard_normal((OUTPUTS, 2, WIDTH)), first).reshape(weight.shape)
    beside = first + 0.5 * rng.standard_normal(first.shape)
    assert error(weight, covariance, beside) > 1e-2
    assert error(weight, covariance, alternated(weight, covariance, beside, WIDTH, sweeps=20)) < 1e-4


def test_a_first_factor_that_reads_all_is_exact() -> None:
    weight, covariance = problem(3)
    first = alternated(weight, covariance, np.eye(COLUMNS), WIDTH, sweeps=1)
    found = nested_least_squares(weight, covariance, np.zeros(COLUMNS * WIDTH), WIDTH, 10**6, first)
    assert found.relative(COLUMNS) == pytest.approx(0, abs=1e-5)


def test_filters_that_see_nothing_are_left_as_they_are() -> None:
    """Dead channels: more filters than directions, unwhitened by the inverse of next to nothing."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, COLUMNS, WIDTH)) * (np.arange(COLUMNS) < 4)[:, None]
    covariance = np.cov(x.reshape(500, -1).T, bias=True)
    weight = rng.standard_normal((OUTPUTS, COLUMNS * WIDTH))
    first = start(weight, covariance, 9)
    square = covariance.reshape(COLUMNS, WIDTH, COLUMNS, WIDTH)
    noisy = first * np.where(np.arange(9) < 4, 1.0, 1e6)[:, None]
    noise = rng.standard_normal((COLUMNS * WIDTH,) * 2) * 1e-8
    rounded = (square.reshape((COLUMNS * WIDTH,) * 2) + noise + noise.T).reshape(square.shape)
    with pytest.raises(np.linalg.LinAlgError):
        best_second(noisy, rounded, (weight @ covariance).reshape(OUTPUTS, COLUMNS, WIDTH))
    found = alternated(weight, rounded.reshape((COLUMNS * WIDTH,) * 2), noisy, WIDTH)
    np.testing.assert_array_equal(found, noisy)
