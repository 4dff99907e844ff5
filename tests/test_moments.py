"""Streamed moments equal those of all data at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank import moments
from onnx_lowrank.moments import Moments, rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_streaming_equals_everything_at_once(parts: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chunks = [rng.standard_normal((p, width)) + 2 for p in parts]
    found = Moments(width)
    for chunk in chunks:
        found.add(chunk)
    whole = np.concatenate(chunks)
    slack = 64 * len(whole) * np.finfo(np.float64).eps * 16
    assert found.count == len(whole)
    np.testing.assert_allclose(found.mean, whole.mean(axis=0), atol=slack)
    np.testing.assert_allclose(found.second, whole.T @ whole / len(whole), atol=slack)
    np.testing.assert_allclose(found.covariance, np.atleast_2d(np.cov(whole.T, bias=True)), atol=slack)


def test_small_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    whole = Moments(3)
    whole.add(data)
    monkeypatch.setattr(moments, "_CHUNK_BYTES", 7 * 24)
    chunked = Moments(3)
    for part in (data[:3], data[3:5], data[5:90], data[90:]):
        chunked.add(part)
        assert chunked.mean.shape == (3,)  # what is read in between changes nothing
    np.testing.assert_allclose(chunked.second, whole.second, rtol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Moments(2).add(np.array([[1.0, bad]]))


def test_the_channel_axis_comes_last() -> None:
    activation = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = rows(activation, 1)
    assert found.shape == (40, 3)
    np.testing.assert_array_equal(found[:, 1], activation[:, 1].reshape(-1))


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_an_outer_product_is_taken_off_part_by_part(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_CHUNK_BYTES", 3 * 8 * 5)
    rng = np.random.default_rng(0)
    matrix, left, right = rng.standard_normal((rows, 5)), rng.standard_normal(rows), rng.standard_normal(5)
    expected = matrix - np.outer(left, right)
    moments.less_outer(matrix, left, right)
    np.testing.assert_array_equal(matrix, expected)
