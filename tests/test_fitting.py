"""Fits of a plan's sites alone are those of all sites: a replay makes the same bytes of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from onnx_lowrank.fitting import calibrate
from onnx_lowrank.input_fits import input_fits
from onnx_lowrank.prepare import Loaded, load
from onnx_lowrank.settings import Settings

CHAIN = """(float[1,6,20,20] x) => (float[1,7,20,20] y) {
    a = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (x, w1, b1)
    h = Relu(a)
    y = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (h, w2, b2)
}"""
"""Two convolutions with a layer between them that may become narrower; 400 positions a sample, not all are taken."""

SHAPES = {"w1": (8, 6, 3, 3), "b1": (8,), "w2": (7, 8, 3, 3), "b2": (7,)}


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {CHAIN}')
    for name, shape in SHAPES.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "m.onnx")
    data = [{"x": rng.standard_normal((1, 6, 20, 20)).astype(np.float32)} for _ in range(12)]
    return load(tmp_path / "m.onnx", data, Settings(cache=tmp_path), lambda *_: None)


def arrays(value: object) -> list[npt.NDArray[np.float64]]:
    assert dataclasses.is_dataclass(value)
    found = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [array for array in found if isinstance(array, np.ndarray)]


@pytest.mark.parametrize("position", [0, 1], ids=["the first", "the reader of a layer"])
def test_nested_fits_do_not_depend_on_what_else_is_asked_for(loaded: Loaded, position: int) -> None:
    name = loaded.sites[position].name
    every = calibrate(loaded, Settings(), lambda *_: None)[name].nested["columns"]
    alone = calibrate(loaded, Settings(), lambda *_: None, {name: ("spatial",)})[name].nested["columns"]
    ranks = min(every.largest, alone.largest)
    assert ranks > 1
    for one, other in zip(every.factors(ranks), alone.factors(ranks), strict=True):
        assert np.array_equal(one, other)


def test_a_narrow_fit_does_not_depend_on_what_else_is_asked_for(loaded: Loaded) -> None:
    name = loaded.sites[1].name
    every = calibrate(loaded, Settings(), lambda *_: None)[name].narrow
    alone = calibrate(loaded, Settings(), lambda *_: None, {name: ("nystrom",)})[name].narrow
    assert len(arrays(every)) == 4
    assert all(np.array_equal(one, other) for one, other in zip(arrays(every), arrays(alone), strict=True))


def test_where_no_fit_needs_an_input_the_samples_are_not_read(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("onnx_lowrank.input_fits.input_moments", never)
    allowed = {site.name: ("svd", "conv_svd") for site in loaded.sites}
    assert input_fits(loaded, allowed, Settings(), lambda *_: None) == {}
