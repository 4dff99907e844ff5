"""The latency table: what is measured once is read afterwards, and belongs to its machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.fragment import Fragment
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.sites import Geometry

GEOMETRY = Geometry("MatMul", 96, 128, "float32", False, 17, x_shape=(8, 128))


def dense() -> Fragment:
    return dense_fragment(GEOMETRY, np.ones((96, 128)), np.zeros(96))


def thin() -> Fragment:
    return SVD.build(GEOMETRY, np.ones((96, 8)), np.ones((8, 128)), np.zeros(96))


def refuse() -> Fragment:
    raise AssertionError("measured again")


def table(folder: Path, threads: int = 1) -> LatencyTable:
    return LatencyTable(folder, provider="cpu", threads=threads)


def test_what_is_in_the_table_is_not_measured_again(tmp_path: Path) -> None:
    first = table(tmp_path)
    times = first.measure(GEOMETRY, {DENSE: dense, "svd 8": thin})
    first.save()
    assert all(ms > 0 for ms in times.values())
    assert table(tmp_path).measure(GEOMETRY, {DENSE: refuse, "svd 8": refuse}) == pytest.approx(times)


def test_another_thread_count_has_another_table(tmp_path: Path) -> None:
    assert table(tmp_path, 1).path != table(tmp_path, 2).path


def test_another_shape_is_another_row(tmp_path: Path) -> None:
    known = table(tmp_path)
    known.measure(GEOMETRY, {DENSE: dense})
    assert known.missing(dataclasses.replace(GEOMETRY, x_shape=(9, 128)), [DENSE]) == [DENSE]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"environment": {}, "ms": {}}', '{"ms": 3}'])
def test_a_damaged_table_counts_as_empty(tmp_path: Path, text: str) -> None:
    known = table(tmp_path)
    known.path.write_text(text)
    assert table(tmp_path).missing(GEOMETRY, [DENSE]) == [DENSE]


def test_the_file_names_the_machine_in_words(tmp_path: Path) -> None:
    known = table(tmp_path)
    known.measure(GEOMETRY, {DENSE: dense})
    known.save()
    assert json.loads(known.path.read_text())["environment"]["provider"] == "cpu"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = table(tmp_path / "file" / "cache")
    known.measure(GEOMETRY, {DENSE: dense})
    known.save()
