"""Synthetic inputs: what each kind of input gets, shapes and their refusals."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.data import open_source
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.inputs import InputSpec
from onnx_lowrank.synthetic import resolve_shapes, synthesize


def spec(name: str, dtype: Any, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


IMAGE = spec("image", np.float32, "n", 3, "h", "w")
IDS = spec("input_ids", np.int64, "batch", "seq")
MASK = spec("attention_mask", np.int64, "batch", "seq")


def make(given: InputSpec, *shape: int) -> Any:
    return synthesize(given, shape, np.random.default_rng(0))


def test_an_image_is_smooth_noise_of_mean_0_and_variance_1() -> None:
    x = make(IMAGE, 1, 3, 64, 64)
    assert x.dtype == np.float32
    assert x.mean() == pytest.approx(0, abs=1e-5)
    assert x.std() == pytest.approx(1, abs=1e-5)
    assert np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1] > 0.5


def test_the_amplitude_of_an_image_falls_as_one_over_f() -> None:
    power = np.abs(np.fft.rfft2(make(spec("x", np.float64, 1, 8, 128, 128), 1, 8, 128, 128))) ** 2
    low, high = power[..., 4, 0].mean(), power[..., 32, 0].mean()
    assert np.log(low / high) / np.log(32 / 4) == pytest.approx(2, abs=0.6)


def test_an_nhwc_image_is_smooth_along_h_and_w_only() -> None:
    x = make(spec("image", np.float32, 1, "h", "w", 3), 1, 64, 64, 3)
    assert np.corrcoef(x[:, 1:].ravel(), x[:, :-1].ravel())[0, 1] > 0.5
    assert abs(np.corrcoef(x[..., 0].ravel(), x[..., 1].ravel())[0, 1]) < 0.5


def test_a_signal_is_smooth_along_its_last_axis() -> None:
    x = make(spec("audio", np.float16, 1, "t"), 1, 4096)
    assert x.dtype == np.float16
    y = x.astype(np.float64)
    assert np.corrcoef(y[0, 1:], y[0, :-1])[0, 1] > 0.5


def test_noise_of_one_value_is_finite() -> None:
    assert np.isfinite(make(spec("x", np.float32, 1, 1), 1, 1)).all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (MASK, 1),
        (spec("token_type_ids", np.int64, "n", "s"), 0),
        (spec("segment_ids", np.int32, "n", "s"), 0),
        (spec("position_ids", np.int64, "n", "s"), [[0, 1, 2], [0, 1, 2]]),
        (spec("use_cache", np.bool_, "n", "s"), True),
        (spec("text", object, "n", "s"), "a"),
    ],
    ids=lambda value: value.name if isinstance(value, InputSpec) else "",
)
def test_an_input_is_recognised_by_its_name_and_dtype(given: InputSpec, expected: Any) -> None:
    x = make(given, 2, 3)
    assert x.dtype == given.dtype
    assert (x == np.asarray(expected)).all()


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
def test_ids_stay_within_the_vocabulary_and_the_dtype(dtype: Any) -> None:
    given = spec("tokens", dtype, "n", "s")
    x = make(given, 1, 5000)
    assert x.min() >= 0
    assert x.max() < 1000
    assert make(dataclasses.replace(given, rows=7), 1, 5000).max() == 6
    assert make(dataclasses.replace(given, rows=5000), 1, 5000).max() < 1000


def test_positions_stay_within_their_table() -> None:
    given = dataclasses.replace(spec("position_ids", np.int64, "n", "s"), rows=2)
    assert make(given, 1, 5).tolist() == [[0, 1, 0, 1, 0]]


def test_a_scalar_integer_is_one_and_a_sample_rate_is_16000() -> None:
    assert make(spec("length", np.int64)).tolist() == 1
    assert make(spec("sr", np.int64)).tolist() == 16000


def test_a_byte_image_uses_the_middle_of_its_range() -> None:
    x = make(spec("image", np.uint8, 1, "h", "w", 3), 1, 64, 64, 3)
    assert x.dtype == np.uint8
    assert 100 < x.mean() < 156


def test_dynamic_dims_get_defaults_by_rank_and_position() -> None:
    hidden = spec("hidden", np.float32, 2, "batch", 128)
    signal = spec("signal", np.float32, None, None)
    assert resolve_shapes([IMAGE, hidden, IDS, signal], {}) == {
        "image": (1, 3, 224, 224),
        "hidden": (2, 1, 128),
        "input_ids": (1, 64),
        "signal": (1, 64),
    }


def test_a_shape_given_for_one_input_is_followed_by_equal_symbols_of_the_others() -> None:
    assert resolve_shapes([MASK, IDS], {"input_ids": (2, 128)})["attention_mask"] == (2, 128)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"imgae": (1, 3, 8, 8)}, r"no input 'imgae'.*did you mean 'image'\?"),
        ({"image": (3, 8, 8)}, "has 3 dims, the model takes image"),
        ({"image": (1, 4, 8, 8)}, "axis 1 is 4, but fixed in the model.*give 3"),
        ({"image": (0, 3, 8, 8)}, "axis 0 is 0; give sizes of at least 1"),
        ({"input_ids": (1, 8), "attention_mask": (1, 9)}, "'seq' is 9 here and 8 in another"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        open_source([IMAGE, IDS, MASK], None, shapes=shapes)
    assert "\n" not in str(caught.value)


def test_the_source_is_the_same_again_and_for_the_same_seed() -> None:
    def values(seed: int) -> list[Any]:
        source = open_source([IMAGE], None, seed=seed, shapes={"image": (1, 3, 8, 8)})
        return [s["image"] for s in itertools.chain(source, source)]

    first = values(0)
    assert len(first) == 32
    np.testing.assert_array_equal(first[:16], first[16:])
    np.testing.assert_array_equal(first, values(0))
    assert not np.array_equal(first, values(1))
    assert not np.array_equal(first[0], first[1])


def test_the_limit_holds_for_synthetic_samples() -> None:
    source = open_source([IDS], None, limit=3)
    assert source.synthetic
    assert len(list(source)) == 3
