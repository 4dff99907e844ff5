"""Data files that are links: the layout of model hubs works everywhere, another one is refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_lowrank
from onnx_lowrank.errors import ModelError
from onnx_lowrank.files import copy_model, make_tensor, read_model, write_model
from onnx_lowrank.linked import followed
from onnx_lowrank.runtime import Session

X = {"x": np.random.default_rng(3).standard_normal((3, 8)).astype(np.float32)}


def hub(folder: Path, model: onnx.ModelProto) -> Path:
    """The model as hubs lay it out: a folder of links to the files, which are named by their hashes."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    write_model(model, folder / "m.onnx", folder=folder, external=True)
    (data,) = (path.name for path in folder.glob("m.onnx.*.data"))
    for name, blob in (("m.onnx", "0a"), (data, "0b")):
        (folder / name).rename(folder / "blobs" / blob)
        (folder / "snapshots" / name).symlink_to(f"../blobs/{blob}")
    return folder / "snapshots" / "m.onnx"


def small() -> onnx.ModelProto:
    """An initializer and a Constant in a branch, each of more than a kilobyte."""
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])
    inner = helper.make_tensor_value_info("c", TensorProto.FLOAT, [64, 64])
    big = make_tensor("", np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32))
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=big)], "b", [], [inner])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["t"]),
        helper.make_node("If", ["yes"], ["v"], then_branch=branch, else_branch=branch),
        helper.make_node("MatMul", ["t", "v"], ["y"]),
    ]
    tensors = [
        make_tensor("w", np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)),
        make_tensor("yes", np.array(True)),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_a_model_of_a_hub_runs_from_its_bytes_too(tmp_path: Path) -> None:
    path = hub(tmp_path / "hub", small())
    read = read_model(path)
    wanted = Session(small()).run(X)[0]
    assert np.array_equal(Session(path).run(X)[0], wanted)
    assert np.array_equal(Session(read.model, folder=read.folder).run(X)[0], wanted)
    copy, folder = followed(read.model, read.folder)
    assert folder == (tmp_path / "hub" / "blobs").resolve()
    assert {e.value for e in copy.graph.initializer[0].external_data if e.key == "location"} == {"0b"}
    assert read.model == read_model(path).model  # as it was


def test_data_in_its_place_needs_no_copy(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_model(small(), tmp_path / "real" / "m.onnx", folder=tmp_path, external=True)
    read = read_model(tmp_path / "link" / "m.onnx")
    assert followed(read.model, read.folder) == (read.model, read.folder)
    assert followed(read.model, read.folder)[0] is read.model


@pytest.mark.parametrize("call", ["optimize", "analyze"])
def test_the_layout_of_hubs_is_optimised(tmp_path: Path, low_rank_model: Callable[..., None], call: str) -> None:
    low_rank_model(tmp_path / "wide.onnx", layers=1)
    path = hub(tmp_path / "hub", onnx.load(tmp_path / "wide.onnx"))
    settings: dict[str, Any] = {"data": str(tmp_path / "wide.npz"), "kinds": ("svd",), "cache": tmp_path / "cache"}
    if call == "analyze":
        assert onnx_lowrank.analyze(path, **settings).plan.decisions[0].kind == "svd"
        return
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "out.onnx"
    assert onnx_lowrank.optimize(path, out, **settings).verdict.status == "optimized"
    model, data = sorted(p.name for p in out.parent.iterdir())
    assert model == "out.onnx"
    assert re.fullmatch(r"out\.onnx\.[0-9a-f]{8}\.data", data)
    assert not any(p.is_symlink() for p in out.parent.iterdir())
    x = np.load(tmp_path / "wide.npz")["x"][0]
    assert np.allclose(Session(out).run({"x": x})[0], Session(path).run({"x": x})[0], atol=1e-2)


def test_a_link_that_the_runtime_does_not_follow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    write_model(small(), path, folder=tmp_path, external=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error: External data path escapes model directory. External data path: w.bin")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(ModelError, match=r"m\.onnx: a data file is a link .* beside the model$"):
        Session(path)


WIDE = {"x": np.random.default_rng(4).standard_normal((3, 16)).astype(np.float32)}


def sparse_model(folder: Path, *, in_node: bool = False) -> tuple[Path, Any]:
    """`y = x·w`, where the values and indices of w, which is sparse, lie in a data file each; and w."""
    values = np.arange(1, 301, dtype=np.float32)
    indices = np.sort(np.random.default_rng(5).choice(16 * 32, 300, replace=False)).astype(np.int64)
    dense = np.zeros(16 * 32, np.float32)
    dense[indices] = values
    sparse = helper.make_sparse_tensor(apart(values, "w", folder), apart(indices, "at", folder), [16, 32])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if in_node:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k]) for n, k in (("x", 16), ("y", 32)))
    graph = helper.make_graph(nodes, "g", [x], [y], sparse_initializer=[] if in_node else [sparse])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx", dense.reshape(16, 32)


def apart(array: Any, name: str, folder: Path) -> TensorProto:
    """A tensor in a data file of its own."""
    tensor = make_tensor(name, array)
    (folder / f"{name}.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=f"{name}.bin")
    return tensor


@pytest.mark.parametrize("in_node", [False, True])
def test_sparse_weights_bring_their_data_files(tmp_path: Path, in_node: bool) -> None:
    for name in ("in", "copy", "out"):
        (tmp_path / name).mkdir()
    path, dense = sparse_model(tmp_path / "in", in_node=in_node)
    read = read_model(path)
    assert read.external
    assert read.bytes == sum(p.stat().st_size for p in path.parent.iterdir())
    copy_model(read, tmp_path / "copy" / "m.onnx")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["at.bin", "m.onnx", "w.bin"]
    sessions = [Session(tmp_path / "copy" / "m.onnx"), Session(read.model, folder=read.folder)]
    for external in (False, True):
        out = tmp_path / "out" / f"{external}.onnx"
        write_model(read.model, out, folder=read.folder, external=external)
        assert read_model(out).external == external
        sessions.append(Session(out))
    for session in sessions:
        assert np.allclose(session.run(WIDE)[0], WIDE["x"] @ dense, rtol=1e-4, atol=1e-3)


def test_a_changed_sparse_weight_is_another_model(tmp_path: Path) -> None:
    path, _ = sparse_model(tmp_path)
    before = read_model(path).sha256
    data = bytearray((tmp_path / "at.bin").read_bytes())
    (tmp_path / "at.bin").write_bytes(bytes([data[0] ^ 1, *data[1:]]))
    assert read_model(path).sha256 != before


@pytest.mark.parametrize(("name", "place"), [("w", "values"), ("at", "indices")])
def test_external_data_of_sparse_weights_is_checked(tmp_path: Path, name: str, place: str) -> None:
    path, _ = sparse_model(tmp_path)
    data = tmp_path / f"{name}.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"'{name}' ends at byte .* get the complete data file"):
        read_model(path)
    model = onnx.load(path, load_external_data=False)
    getattr(model.graph.sparse_initializer[0], place).external_data[0].value = f"../{name}.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        read_model(path)


def test_the_weights_of_training_graphs_are_checked_and_copied(tmp_path: Path) -> None:
    for name in ("in", "copy"):
        (tmp_path / name).mkdir()
    model = small()
    training = model.training_info.add()
    training.algorithm.name = "step"
    training.algorithm.initializer.append(apart(np.ones(7, np.float32), "rates", tmp_path / "in"))
    path = tmp_path / "in" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    copy_model(read_model(path), tmp_path / "copy" / "m.onnx")
    assert (tmp_path / "copy" / "rates.bin").read_bytes() == (tmp_path / "in" / "rates.bin").read_bytes()
    (tmp_path / "in" / "rates.bin").unlink()
    with pytest.raises(ModelError, match=r"'rates'.*is missing"):
        read_model(path)
