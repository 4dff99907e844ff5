"""Made-up ids stay within the tables that they choose rows of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

import onnx_lowrank
from onnx_lowrank.errors import ModelError
from onnx_lowrank.vocabulary import table_rows

TABLE = "float[5, 2] w = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}"
SHORT = "float[2, 3] v = {0, 1, 2, 3, 4, 5}"


def model_of(body: str, outputs: str = "float[a, b, k] y", more: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> '
        f"g (int32[n, s] ids, int64[n, s] other, bool c) => ({outputs}) <{TABLE}, {SHORT}{more}> {{ {body} }}"
    )


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ("y = Gather(w, ids)", {"ids": 5}),
        ("i = Cast <to = 7> (ids) j = Identity(i) k = Flatten(j) y = Gather(w, k)", {"ids": 5}),
        ("y = Gather(w, ids) z = Gather(v, other)", {"ids": 5, "other": 2}),
        ("y = Gather(w, ids) z = Gather(v, ids)", {"ids": 2}),
        ("y = Gather <axis = 1> (v, ids)", {"ids": 3}),
        ("y = Gather <axis = -1> (v, ids)", {"ids": 3}),
        ("y = Gather <axis = 2> (v, ids)", {}),
        ("i = Cast <to = 7> (ids) k = Concat <axis = 0> (i, other) y = Gather(v, k)", {"ids": 2, "other": 2}),
        ("u = Identity(w) y = Gather(u, ids)", {"ids": 5}),
        ("u = Constant <value = float[3, 1] {1, 2, 3}> () y = Gather(u, ids)", {"ids": 3}),
        ("u = DequantizeLinear(q, s) y = Gather(u, ids)", {"ids": 4}),
        ("u = Relu(w) y = Gather(u, ids)", {}),
        ("i = Add(ids, ids) y = Gather(w, i)", {}),
        ("y = com.microsoft.EmbedLayerNormalization(ids, ids, w, v)", {"ids": 5}),
        (
            "y = If (c) <then_branch = a () => (float[n, s, 2] p) { p = Gather(w, ids) }, "
            "else_branch = b () => (float[n, s, 3] q) { u = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> () "
            "q = Gather(u, other) }>",
            {"ids": 5, "other": 2},
        ),
    ],
)
def test_rows_of_tables_are_found_by_input(body: str, rows: dict[str, int]) -> None:
    assert table_rows(model_of(body, more=", int8[4, 1] q = {1, 2, 3, 4}, float s = {0.5}")) == rows


def test_a_model_of_a_small_vocabulary_runs_without_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model_of("i = Cast <to = 7> (ids) y = Gather(w, i)"), path)
    assert onnx_lowrank.analyze(path, cache=tmp_path / "cache").plan.decisions == ()


def test_ids_that_cannot_be_known_ask_for_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model_of("i = Add(ids, ids) y = Gather(w, i)"), path)
    with pytest.raises(ModelError, match=r"out of data bounds.*made up: give real --data$"):
        onnx_lowrank.analyze(path, cache=tmp_path / "cache")
    data = [{"ids": np.zeros((1, 2), np.int32), "other": np.zeros((1, 2), np.int64), "c": np.array(True)}] * 2
    assert onnx_lowrank.analyze(path, data=data, cache=tmp_path / "cache").plan.decisions == ()
