"""Model files: every refusal, byte identity, whole or not at all, external data."""

from __future__ import annotations

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank import files, saving
from onnx_lowrank.errors import ModelError, SettingsError
from onnx_lowrank.files import copy_model, make_tensor, read_model, read_tensor, write_model
from onnx_lowrank.publishing import check_output

Usage = namedtuple("Usage", "total used free")
WEIGHTS = {
    "w1": np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32),
    "w2": np.random.default_rng(1).standard_normal((50, 30)).astype(np.float32),
    "bias": np.arange(30, dtype=np.float32),
}


def model_of(tensors: list[TensorProto] | None = None) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["t"]),
        helper.make_node("MatMul", ["t", "w2"], ["u"]),
        helper.make_node("Add", ["u", "bias"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 40])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 30])
    tensors = tensors or [make_tensor(name, array) for name, array in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"made": "by a test"})
    return model


def run(path: Path) -> Any:
    x = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def external_entries(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".onnx-lowrank-*"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.onnx"
    path.write_bytes(model_of().SerializeToString())
    return path


@pytest.fixture
def split(tmp_path: Path) -> Path:
    path = tmp_path / "split" / "model.onnx"
    path.parent.mkdir()
    write_model(model_of(), path, folder=tmp_path, external=True)
    return path


def data_of(path: Path) -> Path:
    """The one data file of a model."""
    (found,) = read_model(path).data.values()
    return found


def damage(path: Path, **entries: str | None) -> Path:
    """The model with other external data entries for w1."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "w1")
    old = {e.key: e.value for e in tensor.external_data}
    del tensor.external_data[:]
    for key, value in (old | entries).items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


# Reading


def test_a_model_is_read_with_its_hash_and_size(plain: Path) -> None:
    read = read_model(plain)
    assert read.model == model_of()
    assert (read.bytes, read.external, read.folder) == (plain.stat().st_size, False, plain.parent)
    again = plain.with_name("again.onnx")
    shutil.copy(plain, again)
    assert read_model(again).sha256 == read.sha256


def test_the_hash_and_the_size_count_the_data_file(split: Path) -> None:
    data = data_of(split)
    before = read_model(split)
    assert before.external
    assert before.bytes == split.stat().st_size + data.stat().st_size
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert read_model(split).sha256 != before.sha256


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "does not exist")


def test_a_folder_is_refused_as_a_model(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")


def test_a_device_is_refused_as_a_model() -> None:
    refused(Path("/dev/null"), "not a regular file")


def test_an_empty_model_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    refused(tmp_path / "m.onnx", "is empty")


def test_a_model_that_may_not_be_read_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    refused(plain, "Permission denied")


def test_a_model_beyond_what_protobuf_reads_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LIMIT", 100)
    refused(plain, "2 GB")


@pytest.mark.parametrize("content", [b"not a model", b"\x08\x08", b"{}", b"\x00" * 64, b"<html>no</html>"])
def test_what_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "is not an ONNX model")


def test_a_model_that_is_cut_short_is_refused(plain: Path) -> None:
    plain.write_bytes(plain.read_bytes()[:-500])
    refused(plain, "cut short")


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tmp_path / "m.onnx", "git lfs pull")


def test_a_missing_data_file_is_refused(split: Path) -> None:
    data_of(split).unlink()
    refused(split, "'w1'.*is missing")


def test_a_truncated_data_file_is_refused(split: Path) -> None:
    data = data_of(split)
    data.write_bytes(data.read_bytes()[:-1])
    refused(split, "'w2'.*complete data file")


@pytest.mark.parametrize(
    "location", ["../w", "/etc/passwd", "a/../../w", "..\\w", "C:\\w", "", "w\0", "..", "\\\\h\\w"]
)
def test_a_data_file_outside_the_folder_is_refused(split: Path, location: str) -> None:
    (split.parent.parent / "w").write_bytes(bytes(100_000))
    refused(damage(split, location=location), "'w1'.*outside the model's folder")


def test_external_data_of_the_wrong_length_is_refused(split: Path) -> None:
    refused(damage(split, length="7996"), "needs 8000 bytes but.*7996")


@pytest.mark.parametrize("entries", [{"offset": "-4096"}, {"offset": "x"}, {"length": "8e3"}])
def test_external_data_with_a_bad_number_is_refused(split: Path, entries: dict[str, str]) -> None:
    refused(damage(split, **entries), "not a whole number")


def test_an_offset_beyond_the_data_file_is_refused(split: Path) -> None:
    refused(damage(split, offset=str(2**62)), "complete data file")


def test_external_strings_are_refused(split: Path) -> None:
    model = onnx.load(split, load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.STRING
    split.write_bytes(model.SerializeToString())
    refused(split, "STRING, which cannot be external")


def test_a_negative_dimension_is_refused(split: Path) -> None:
    model = onnx.load(split, load_external_data=False)
    model.graph.initializer[0].dims[0] = -40
    split.write_bytes(model.SerializeToString())
    refused(split, "negative dimension")


def test_a_length_may_be_left_out(split: Path) -> None:
    read = read_model(damage(split, length=None))
    assert np.array_equal(read_tensor(read.model.graph.initializer[0], read.folder), WEIGHTS["w1"])


def test_external_tensors_of_subgraphs_and_constants_are_checked(split: Path) -> None:
    outside = TensorProto(name="inner", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="nowhere")
    constant = helper.make_node("Constant", [], ["c"], value=outside)
    y = helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])
    for branch in (helper.make_graph([constant], "b", [], [y]), helper.make_graph([], "b", [], [y], [outside])):
        model = onnx.load(split, load_external_data=False)
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch))
        path = split.with_name("if.onnx")
        path.write_bytes(model.SerializeToString())
        refused(path, "'inner'.*is missing")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_linked_data_file_is_accepted(split: Path, tmp_path: Path, link: Any) -> None:
    before = run(split)
    data = data_of(split)
    blob = data.rename(tmp_path / "blob")
    link(blob, data)
    read = read_model(split)
    assert np.array_equal(read_tensor(read.model.graph.initializer[0], read.folder), WEIGHTS["w1"])
    assert np.array_equal(run(write_again(split, tmp_path / "out.onnx", external=True)), before)


# Tensors


DTYPES = [np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64)]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(dtype=st.sampled_from(DTYPES), shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_a_tensor_comes_back_as_it_was_made(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> None:
    size = int(np.prod(shape)) * dtype.itemsize
    array = np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)
    tensor = make_tensor("t", array)
    back = read_tensor(tensor, Path("nowhere"))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, shape, array.tobytes())
    assert numpy_helper.to_array(tensor).tobytes() == array.tobytes()


@given(dtype=st.sampled_from(DTYPES), shape=SHAPES)
def test_an_external_tensor_comes_back_as_it_was_made(
    tmp_path_factory: pytest.TempPathFactory, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    folder = tmp_path_factory.mktemp("t")
    size = int(np.prod(shape)) * dtype.itemsize
    content = np.random.default_rng(size).bytes(size + 3)
    (folder / "data").write_bytes(content)
    tensor = make_tensor("t", np.zeros(shape, dtype))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", "3")):
        tensor.external_data.add(key=key, value=value)
    back = read_tensor(tensor, folder)
    assert (back.dtype, back.shape, back.tobytes()) == (dtype, shape, content[3:])


def test_a_transposed_or_big_endian_array_is_stored_right() -> None:
    for array in (WEIGHTS["w1"].T, WEIGHTS["w1"].astype(">f4")):
        assert np.array_equal(numpy_helper.to_array(make_tensor("t", array)), array)


def test_bfloat16_in_the_typed_field_is_read() -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.BFLOAT16, dims=[2], int32_data=[0x3F80, 0xC000])
    assert read_tensor(tensor, Path()).tolist() == [1.0, -2.0]
    assert read_tensor(tensor, Path()).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2], raw_data=b"1234"),
        TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2], float_data=[1.0]),
        TensorProto(name="t", data_type=TensorProto.BFLOAT16, dims=[2], int32_data=[1]),
        TensorProto(name="t", data_type=TensorProto.INT4, dims=[5], raw_data=b"12"),
    ],
)
def test_a_tensor_of_inconsistent_size_is_refused(tensor: TensorProto) -> None:
    with pytest.raises(ModelError, match=r"tensor 't' holds data that does not fit"):
        read_tensor(tensor, Path())


def test_an_array_that_onnx_cannot_store_is_refused() -> None:
    with pytest.raises(ModelError, match="ONNX cannot store"):
        make_tensor("t", np.array(["2020-01-01"], "datetime64[D]"))


# Outputs


def refused_output(out: Path, model: Path, match: str, in_place: bool = False) -> None:
    with pytest.raises(SettingsError, match=match) as caught:
        check_output(out, model, in_place=in_place)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused_as_output(plain: Path) -> None:
    refused_output(plain.parent, plain, "is a folder")


def test_a_device_is_refused_as_output(plain: Path) -> None:
    refused_output(Path("/dev/null"), plain, "device")


def test_an_output_in_a_missing_folder_is_refused(plain: Path) -> None:
    refused_output(plain.parent / "no" / "out.onnx", plain, "does not exist")


def test_an_output_below_a_file_is_refused(plain: Path) -> None:
    refused_output(plain / "out.onnx", plain, "is not a folder")


def test_an_output_where_nothing_can_be_written_is_refused(plain: Path) -> None:
    refused_output(Path("/proc/out.onnx"), plain, "not writable")
    refused_output(plain.with_name("o" * 240), plain, "not writable .File name too long")
    assert [path.name for path in plain.parent.iterdir()] == [plain.name]


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_input_is_replaced_only_when_asked(plain: Path, link: Any) -> None:
    out = plain.with_name("linked.onnx") if link else plain
    if link:
        link(plain, out)
    refused_output(out, plain, "add --in-place to replace it")
    check_output(out, plain, in_place=True)


def test_a_new_or_an_old_output_is_accepted(plain: Path, split: Path) -> None:
    check_output(plain.with_name("new"), plain, in_place=False)
    check_output(split, plain, in_place=False)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_folder_that_takes_no_files_is_refused_when_saving(plain: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot write '/proc/out.onnx'"):
        write_model(model_of(), Path("/proc/out.onnx"), folder=plain.parent, external=False)
    with pytest.raises(SettingsError, match="cannot write"):
        write_model(model_of(), plain / "out.onnx", folder=plain.parent, external=True)


def test_a_full_disk_is_refused_before_writing(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 99, 1))
    out = plain.with_name("out.onnx")
    with pytest.raises(SettingsError, match="MB free; make room"):
        write_model(model_of(), out, folder=plain.parent, external=True)
    assert sorted(plain.parent.iterdir()) == [plain]


# Writing


def write_again(path: Path, out: Path, *, external: bool) -> Path:
    read = read_model(path)
    write_model(read.model, out, folder=read.folder, external=external)
    return out


def test_a_model_without_external_data_is_written_as_one_file(tmp_path: Path) -> None:
    out, model = tmp_path / "out.onnx", model_of()
    assert write_model(model, out, folder=tmp_path, external=False) == out.stat().st_size
    assert out.read_bytes() == model.SerializeToString()
    assert list(tmp_path.iterdir()) == [out]


def test_external_data_round_trips_through_the_runtime(plain: Path, split: Path, tmp_path: Path) -> None:
    expected = run(plain)
    assert np.array_equal(run(split), expected)
    assert np.array_equal(run(write_again(split, tmp_path / "again.onnx", external=True)), expected)
    joined = write_again(split, tmp_path / "joined.onnx", external=False)
    assert np.array_equal(run(joined), expected)
    assert not read_model(joined).external


def test_offsets_are_aligned_and_small_tensors_stay_inside(split: Path) -> None:
    entries = external_entries(split)
    assert sorted(entries) == ["w1", "w2"]
    assert {entry["location"] for entry in entries.values()} == {data_of(split).name}
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{8}\.data", data_of(split).name)
    assert [int(entry["offset"]) for entry in entries.values()] == [0, 8192]
    assert data_of(split).stat().st_size == 8192 + 50 * 30 * 4


def test_the_bytes_written_count_both_files(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    written = write_model(model_of(), out, folder=tmp_path, external=True)
    assert written == sum(path.stat().st_size for path in tmp_path.iterdir()) == read_model(out).bytes


def test_the_model_passed_is_not_changed(split: Path, tmp_path: Path) -> None:
    for model in (model_of(), read_model(split).model):
        before = model.SerializeToString()
        for external in (True, False):
            write_model(model, tmp_path / "out.onnx", folder=split.parent, external=external)
        assert model.SerializeToString() == before


def test_nothing_but_the_weights_differs_in_an_external_model(split: Path) -> None:
    loaded = onnx.load(split)
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
    assert loaded == model_of()


def test_a_model_beyond_two_gigabytes_becomes_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LIMIT", 10_000)
    out = tmp_path / "out.onnx"
    write_model(model_of(), out, folder=tmp_path, external=False)
    assert read_model(out).external
    monkeypatch.setattr(files, "_LIMIT", 100)
    with pytest.raises(ModelError, match="would exceed 2 GB without its weights"):
        write_model(model_of(), out, folder=tmp_path, external=False)


def test_weights_in_typed_fields_become_external_too(tmp_path: Path, plain: Path) -> None:
    typed = [helper.make_tensor(name, TensorProto.FLOAT, w.shape, w.ravel().tolist()) for name, w in WEIGHTS.items()]
    assert typed[0].float_data
    out = tmp_path / "out.onnx"
    write_model(model_of(typed), out, folder=tmp_path, external=True)
    assert sorted(external_entries(out)) == ["w1", "w2"]
    assert np.array_equal(run(out), run(plain))


def test_external_tensors_of_a_subgraph_follow_the_model(split: Path, tmp_path: Path) -> None:
    model = onnx.load(split, load_external_data=False)
    weight = next(t for t in model.graph.initializer if t.name == "w1")
    inner = TensorProto()
    inner.CopyFrom(weight)
    inner.name = "inner"
    constant = helper.make_node("Constant", [], ["c"], value=inner)
    y = helper.make_tensor_value_info("c", TensorProto.FLOAT, [40, 50])
    model.graph.node.append(
        helper.make_node("If", ["x"], ["z"], then_branch=helper.make_graph([constant], "b", [], [y]))
    )
    out = tmp_path / "out.onnx"
    for external in (True, False):
        write_model(model, out, folder=split.parent, external=external)
        written = read_model(out)
        moved = written.model.graph.node[-1].attribute[0].g.node[0].attribute[0].t
        assert np.array_equal(read_tensor(moved, tmp_path), WEIGHTS["w1"])


def test_a_model_is_replaced_in_place_with_its_data(split: Path) -> None:
    before = run(split)
    read = read_model(split)
    kept = read.model.graph.initializer
    reordered = [kept[1], make_tensor("w1", WEIGHTS["w1"]), kept[2]]  # w2 now reads from another offset
    model = model_of(reordered)
    write_model(model, split, folder=read.folder, external=True)
    assert np.array_equal(run(split), before)
    assert external_entries(split)["w2"]["offset"] == "0"


def test_a_data_file_of_the_source_is_not_overwritten(split: Path) -> None:
    read = read_model(damage(split))
    other = split.rename(split.with_name("renamed.onnx"))
    data = data_of(other)
    before = data.read_bytes()
    with pytest.raises(SettingsError, match="is a data file of the source model"):
        write_model(read.model, data, folder=read.folder, external=True)
    with pytest.raises(SettingsError, match="is a data file of the source model"):
        copy_model(read_model(other), data)
    write_model(model_of([make_tensor("w1", -WEIGHTS["w1"])]), split, folder=read.folder, external=True)
    assert data.read_bytes() == before
    assert len(list(split.parent.glob("*.data"))) == 2


def test_the_mode_of_a_replaced_file_is_kept(plain: Path) -> None:
    plain.chmod(0o640)
    write_model(model_of(), plain, folder=plain.parent, external=False)
    assert plain.stat().st_mode & 0o777 == 0o640


# Whole or not at all


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_the_previous_output_survives_a_failed_save(
    split: Path, monkeypatch: pytest.MonkeyPatch, function: str, fault: BaseException, fails_at: int
) -> None:
    before, calls, real = snapshot(split.parent), [0], getattr(os, function)

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails_at:
            raise fault
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, fail)
    changed = model_of([make_tensor(name, array + 1) for name, array in WEIGHTS.items()])
    with pytest.raises((SettingsError, KeyboardInterrupt)):
        write_model(changed, split, folder=split.parent, external=True)
    assert snapshot(split.parent) == before
    monkeypatch.undo()
    run(split)


def test_a_failed_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    for external in (True, False):
        with pytest.raises(SettingsError, match="No space left on device"):
            write_model(model_of(), tmp_path / "out.onnx", folder=tmp_path, external=external)
    assert list(tmp_path.iterdir()) == []


def test_a_new_data_file_goes_when_its_model_cannot_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def fail(source: Any, target: Any) -> None:
        if str(target).endswith(".onnx"):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SettingsError):
        write_model(model_of(), tmp_path / "out.onnx", folder=tmp_path, external=True)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_the_source_leaves_no_temporary_file(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> Any:
        yield b"some"
        raise ModelError("became shorter")

    before = snapshot(split.parent)
    monkeypatch.setattr(files, "raw_chunks", cut)
    with pytest.raises(ModelError, match="became shorter"):
        write_model(read_model(split).model, split, folder=split.parent, external=True)
    assert snapshot(split.parent) == before


# Copying


def test_a_copy_is_byte_for_byte(plain: Path) -> None:
    plain.write_bytes(plain.read_bytes() + b"\xf8\x07\x01")  # an unknown field at the end
    out = plain.with_name("copy.onnx")
    assert copy_model(read_model(plain), out) == plain.stat().st_size
    assert out.read_bytes() == plain.read_bytes()
    assert temporaries(plain.parent) == []


def test_a_copy_takes_its_data_files_to_another_folder(split: Path, tmp_path: Path) -> None:
    split.with_name("weights").mkdir()
    data_of(split).rename(split.parent / "weights" / "all.bin")
    model = onnx.load(split, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "weights/all.bin" if entry.key == "location" else entry.value
    split.write_bytes(model.SerializeToString())
    out = tmp_path / "out.onnx"
    source = read_model(split)
    assert copy_model(source, out) == source.bytes
    assert read_model(out).sha256 == source.sha256
    assert np.array_equal(run(out), run(split))


def test_a_copy_in_the_same_folder_shares_the_data_file(split: Path) -> None:
    out = split.with_name("copy.onnx")
    assert copy_model(read_model(split), out) == split.stat().st_size
    assert {p.name for p in split.parent.iterdir()} == {"copy.onnx", "model.onnx", data_of(split).name}
    assert np.array_equal(run(out), run(split))


def test_a_copy_onto_itself_does_nothing(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_write", None)
    link = plain.with_name("link.onnx")
    link.symlink_to(plain)
    assert copy_model(read_model(plain), plain) == copy_model(read_model(plain), link) == 0


def test_a_copy_with_the_name_of_its_data_file_is_refused(split: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has the name of the model's data file"):
        copy_model(read_model(split), tmp_path / data_of(split).name)
    assert not (tmp_path / data_of(split).name).exists()


def test_a_failed_copy_leaves_the_previous_output(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"previous")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        copy_model(read_model(split), out)
    assert out.read_bytes() == b"previous"
    assert temporaries(tmp_path) == []
