"""Theory is the oracle: Eckart–Young gives equalities, rounding is the only tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.linalg import (
    Array,
    common_pivots,
    correct_bias,
    end_pivots,
    factor_gram,
    factor_input,
    from_half,
    half_of,
    signed,
)

EPS = float(np.finfo(np.float64).eps)
SIZES = st.tuples(st.integers(2, 24), st.integers(2, 24), st.integers(1, 80), st.integers(0, 2**32 - 1))


def problem(n: int, k: int, positions: int, seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((positions, k)) * 10.0 ** rng.uniform(-2, 2, k)
    return rng.standard_normal((n, k)), x, x.T @ x / positions


def measured(weight: Array, approximation: Array, x: Array) -> float:
    return float(np.mean(np.sum((x @ (weight - approximation).T) ** 2, axis=1)))


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_the_predicted_error_is_the_measured_one_at_every_rank(sizes: tuple[int, int, int, int]) -> None:
    weight, x, second = problem(*sizes)
    for found in (factor_gram(weight @ second @ weight.T), factor_input(weight, second)):
        for rank in range(len(found.values) + 1):
            left, right = found.pair(weight, rank)
            slack = 64 * len(weight) * EPS * found.total
            assert measured(weight, left @ right, x) == pytest.approx(found.error(rank), abs=slack)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_both_forms_agree(sizes: tuple[int, int, int, int]) -> None:
    weight, _, second = problem(*sizes)
    gram, whitened = factor_gram(weight @ second @ weight.T), factor_input(weight, second)
    slack = 64 * max(weight.shape) * EPS * gram.total
    shared = min(len(gram.values), len(whitened.values))
    np.testing.assert_allclose(gram.values[:shared], whitened.values[:shared], atol=slack)


def test_no_other_matrix_of_that_rank_is_nearer() -> None:
    weight, x, second = problem(12, 9, 200, 1)
    left, right = factor_gram(weight @ second @ weight.T).pair(weight, 3)
    best = measured(weight, left @ right, x)
    rng = np.random.default_rng(2)
    for scale in (1e-3, 1e-1, 1.0):
        other = (left + scale * rng.standard_normal(left.shape)) @ (right + scale * rng.standard_normal(right.shape))
        assert measured(weight, other, x) >= best


def test_full_rank_gives_the_weight_back() -> None:
    weight, _, second = problem(7, 11, 3, 3)  # S is singular: 3 positions, 11 dimensions
    left, right = factor_gram(weight @ second @ weight.T).pair(weight, 7)
    np.testing.assert_allclose(left @ right, weight, atol=32 * EPS * float(np.linalg.norm(weight)))


def test_silence_has_no_error() -> None:
    found = factor_gram(np.zeros((4, 4)))
    assert [found.relative(rank) for rank in range(5)] == [0.0] * 5


def test_the_corrected_bias_keeps_the_mean_and_beats_every_other() -> None:
    weight, x, _ = problem(8, 6, 100, 4)
    x = x + 3.0
    bias = np.arange(8.0)
    outputs = x @ weight.T + bias
    left, right = factor_gram(np.cov(outputs.T, bias=True)).pair(weight, 2)
    corrected = correct_bias(left, left.T, outputs.mean(axis=0) - bias, outputs.mean(axis=0))
    residual = outputs - (x @ (left @ right).T + corrected)
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e4 * EPS * np.abs(outputs).max())
    assert np.sum(residual**2) <= np.sum((residual + corrected - bias) ** 2)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 40), st.data(), st.integers(0, 2**32 - 1))
def test_end_rows_reproduce_the_basis(n: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(1, n))
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, rank)))[0]
    pivots, rest, coefficients = end_pivots(basis)
    assert sorted([*range(n)[pivots], *range(n)[rest]]) == list(range(n))
    slack = 64 * n * EPS * np.linalg.cond(basis[pivots])
    np.testing.assert_allclose(coefficients @ basis[pivots], basis[rest], atol=slack)


def test_the_end_with_the_smaller_coefficients_is_taken() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 3)))[0]
    basis[0] *= 1e-9  # a channel that hardly varies is a bad pivot
    assert end_pivots(basis)[0] == slice(6, 9)
    assert end_pivots(basis[::-1])[0] == slice(0, 3)


def test_singular_pivots_give_finite_coefficients_that_tell() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 3)))[0]
    basis[0] = 0.0
    assert end_pivots(basis)[0] == slice(6, 9)
    basis[8] = 0.0
    coefficients = end_pivots(basis)[2]
    assert np.isfinite(coefficients).all()
    assert np.abs(coefficients).max() > 1e12


def test_common_pivots_write_all_rows_and_have_the_smallest_coefficients() -> None:
    rng = np.random.default_rng(0)
    bases = [rng.standard_normal((count, 4)) for count in (3, 7, 4)]
    owner, pivots, coefficients = common_pivots(bases)
    rest = [np.delete(basis, pivots, axis=0) if i == owner else basis for i, basis in enumerate(bases)]
    for wanted, combined in zip(rest, coefficients, strict=True):
        assert combined @ bases[owner][pivots] == pytest.approx(wanted, abs=1e-9)
    ends = [(1, slice(0, 4)), (1, slice(3, 7)), (2, slice(0, 4))]  # the first basis has fewer rows than pivots
    assert (owner, pivots) in ends
    largest = [np.abs(np.concatenate(bases) @ np.linalg.inv(bases[i][rows])).max() for i, rows in ends]
    assert max(np.abs(c).max(initial=0) for c in coefficients) == pytest.approx(min(largest), abs=1e-9)


def test_common_pivots_are_never_dead_outputs_where_others_are_alive() -> None:
    rng = np.random.default_rng(1)
    bases = [rng.standard_normal((6, 3)), rng.standard_normal((5, 3))]
    bases[0][:] = 0
    bases[1][:2] = 0
    owner, pivots, _ = common_pivots(bases)
    assert (owner, pivots) == (1, slice(2, 5))


def test_the_sign_of_a_direction_is_settled() -> None:
    """The same factors come out of a Gram matrix whichever sign its eigenvectors were found with."""
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 4)))[0]
    flipped = vectors * np.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_array_equal(signed(vectors), signed(flipped))
    np.testing.assert_array_equal(np.abs(signed(vectors)), np.abs(vectors))
    assert (signed(vectors).max(axis=0) == np.abs(vectors).max(axis=0)).all()


@given(st.integers(1, 12), st.integers(0, 2**16))
def test_half_of_a_symmetric_matrix_is_all_of_it(width: int, seed: int) -> None:
    square = np.random.default_rng(seed).standard_normal((width, width))
    whole = square + square.T
    half = half_of(whole)
    assert half.shape == (width * (width + 1) // 2,)
    assert np.array_equal(from_half(half, width), whole)
