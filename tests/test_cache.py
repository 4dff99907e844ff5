"""The cache as a user handles it: list, clear, export, import, plan with another machine's table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank import cache
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.fragment import Fragment
from onnx_lowrank.latency import DENSE, LatencyTable, read_table, table_name
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.sites import Geometry

GEOMETRY = Geometry("MatMul", 32, 16, "float32", False, 17, x_shape=(4, 16))


def dense() -> Fragment:
    return dense_fragment(GEOMETRY, np.ones((32, 16)), np.zeros(32))


def refuse() -> Fragment:
    raise AssertionError("measured")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table = LatencyTable(tmp_path / "cache", provider="cpu", threads=1)
    table.measure(GEOMETRY, {DENSE: dense})
    table.save()
    return tmp_path / "cache"


def foreign(path: Path) -> None:
    """A table of another machine, which knows one more rank."""
    environment = {"processor": "a phone", "provider": "cpu", "threads": 1}
    rows = {GEOMETRY.key(): {DENSE: 4.0, "svd 8": 1.0}}
    path.write_text(json.dumps({"environment": environment, "ms": rows}))


def test_tables_are_listed_and_cleared(folder: Path) -> None:
    (entry,) = cache.entries(folder)
    assert entry.here
    assert entry.geometries == 1
    assert entry.environment["provider"] == "cpu"
    assert cache.clear(folder) == 1
    assert cache.entries(folder) == []


def test_an_exported_table_is_imported_as_it_is(folder: Path, tmp_path: Path) -> None:
    cache.export(folder, tmp_path / "t.json")
    entry = cache.bring(tmp_path / "other", tmp_path / "t.json")
    assert read_table(entry.path) == read_table(tmp_path / "t.json")


def test_known_times_stay_when_a_table_is_imported(tmp_path: Path) -> None:
    foreign(tmp_path / "t.json")
    environment, _ = read_table(tmp_path / "t.json")
    known = tmp_path / "cache" / table_name(environment)
    known.parent.mkdir()
    known.write_text(json.dumps({"environment": environment, "ms": {GEOMETRY.key(): {DENSE: 5.0}}}))
    cache.bring(tmp_path / "cache", tmp_path / "t.json")
    assert read_table(known)[1] == {GEOMETRY.key(): {DENSE: 5.0, "svd 8": 1.25}}  # a quarter of the dense one, as there


def test_nothing_is_timed_with_a_given_table(tmp_path: Path) -> None:
    foreign(tmp_path / "t.json")
    table = LatencyTable(tmp_path / "t.json", provider="cpu", threads=1)
    assert table.given
    labels = {DENSE: refuse, "svd 8": refuse, "svd 16": refuse}
    assert table.measure(GEOMETRY, labels) == {DENSE: 4.0, "svd 8": 1.0}
    assert table.environment["processor"] == "a phone"


def test_a_table_of_other_threads_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "t.json")
    with pytest.raises(SettingsError, match="1 threads"):
        LatencyTable(tmp_path / "t.json", provider="cpu", threads=2)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(SettingsError, match="not a latency table"):
        cache.bring(tmp_path, tmp_path / "t.json")


def test_there_is_nothing_to_export_before_something_was_measured(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no table"):
        cache.export(tmp_path, tmp_path / "t.json")


def test_the_noise_is_that_of_dense_against_itself(folder: Path) -> None:
    table = LatencyTable(folder, provider="cpu", threads=1)
    assert 0.01 <= table.noise(GEOMETRY) <= 0.08
