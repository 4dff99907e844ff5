"""Saving beside other models: what they read stays, whatever name and fate a run has."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lowrank
from onnx_lowrank.errors import LowRankError, SettingsError
from onnx_lowrank.files import copy_model, read_model
from onnx_lowrank.publishing import publish, staging
from onnx_lowrank.runtime import Session
from tests.saved import save_table

WIDTH, READ = 192, 64
ROOT = Path(__file__).resolve().parent.parent
SAMPLES = np.random.default_rng(9).standard_normal((6, READ, WIDTH)).astype(np.float32)


def save(path: Path, data: str, *, seed: int = 0, rank: int = 16) -> Path:
    """A MatMul of some rank, its weight in a data file."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((WIDTH, rank)) @ rng.standard_normal((rank, WIDTH)) / WIDTH
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", WIDTH]) for n in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]
    tensors = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def optimize(model: Path, out: Path, **choices: Any) -> onnx_lowrank.Report:
    """By a table of times, so that nothing is timed; a low rank pays, and full rank does not."""
    table = save_table(model.parent / "table.json", WIDTH, str(READ))
    try:
        return onnx_lowrank.optimize(
            model, out, data=[{"x": x} for x in SAMPLES], cache=table, verify_latency=False, refit=False,
            kinds=("svd",), max_loss=1e-3, **choices,
        )  # fmt: skip
    finally:
        table.unlink()


def computed(path: Path) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = Session(path).run({"x": SAMPLES[0]})[0]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def location(path: Path) -> str:
    (name,) = read_model(path).data
    return name


def test_an_output_does_not_take_the_data_of_its_input(tmp_path: Path) -> None:
    """PyTorch's exporter gives data the very name that OUT's would have; the model was renamed since."""
    original = save(tmp_path / "model.onnx", "model.onnx.data").rename(tmp_path / "original.onnx")
    before = content(tmp_path)
    assert optimize(original, tmp_path / "model.onnx").verdict.status == "optimized"
    assert content(tmp_path).items() > before.items()
    assert np.allclose(computed(tmp_path / "model.onnx"), computed(original), atol=1e-3)


def test_an_output_does_not_take_the_data_of_a_strange_model(tmp_path: Path) -> None:
    other = save(tmp_path / "here" / "out.onnx", "out.onnx.data", seed=1).rename(tmp_path / "here" / "other.onnx")
    before = content(tmp_path / "here")
    optimize(save(tmp_path / "m" / "m.onnx", "m.data"), tmp_path / "here" / "out.onnx")
    assert content(tmp_path / "here").items() > before.items()
    computed(other)


@pytest.mark.parametrize("rank", [16, WIDTH])
def test_a_data_file_of_the_input_is_no_output(tmp_path: Path, rank: int) -> None:
    original = save(tmp_path / "original.onnx", "weights.onnx", rank=rank)
    before = content(tmp_path)
    with pytest.raises(SettingsError, match="is a data file of the source model"):
        optimize(original, tmp_path / "weights.onnx")
    assert content(tmp_path) == before


def test_an_unchanged_copy_does_not_take_the_data_of_another_model(tmp_path: Path) -> None:
    """Exports of one hub, all with the same name for their data."""
    first, second = (
        save(tmp_path / name / "model.onnx", "model.onnx_data", seed=seed, rank=WIDTH)
        for seed, name in enumerate(("a", "b"))
    )
    out = tmp_path / "out"
    out.mkdir()
    assert optimize(first, out / "a.onnx").verdict.status == "unchanged"
    before = content(out)
    report = optimize(second, out / "b.onnx")
    assert report.verdict.status == "unchanged"
    assert "model.onnx_data' is there with other content" in report.warnings[-1]
    assert location(out / "b.onnx").startswith("b.onnx.")
    assert report.after.sha256 == read_model(out / "b.onnx").sha256
    assert content(out).items() > before.items()
    for copy, original in ((out / "a.onnx", first), (out / "b.onnx", second)):
        assert np.array_equal(computed(copy), computed(original))
    assert optimize(first, out / "again.onnx").verdict.status == "unchanged"  # the same data may be there
    assert (out / "again.onnx").read_bytes() == first.read_bytes()


def test_the_next_unchanged_copy_takes_the_place_of_the_last(tmp_path: Path) -> None:
    """Every night the same command on weights that were trained anew, none of which can be factored."""
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    for night in range(4):
        model = save(tmp_path / "in" / "model.onnx", "model.onnx.data", seed=night, rank=WIDTH)
        assert optimize(model, out).verdict.status == "unchanged"
        assert np.array_equal(computed(out), computed(model))
        assert content(out.parent).keys() == {"model.onnx", location(out)}


def test_a_copy_over_the_data_of_another_model_is_refused(tmp_path: Path) -> None:
    first, second = (save(tmp_path / name / "model.onnx", "data", seed=k) for k, name in enumerate("ab"))
    (tmp_path / "out").mkdir()
    copy_model(read_model(first), tmp_path / "out" / "a.onnx")
    with pytest.raises(SettingsError, match=r"data' is there with other content; choose an output in another folder"):
        copy_model(read_model(second), tmp_path / "out" / "b.onnx")


def test_a_copy_has_the_data_that_the_file_names(tmp_path: Path) -> None:
    """Whatever became of the model in memory: neighbours that were multiplied read no data file any more."""
    file = read_model(save(tmp_path / "in" / "m.onnx", "m.data"))
    del file.model.graph.initializer[:]
    copy_model(file, tmp_path / "out.onnx")
    assert set(content_names(tmp_path)) == {"in", "out.onnx", "m.data"}
    assert np.array_equal(computed(tmp_path / "out.onnx"), computed(file.path))


# The data of the previous OUT


def test_data_of_the_previous_output_goes_and_what_others_read_stays(tmp_path: Path) -> None:
    model, out = save(tmp_path / "in" / "m.onnx", "m.data"), tmp_path / "out.onnx"
    optimize(model, out)
    first = location(out)
    assert first.startswith("out.onnx.")
    optimize(model, out)
    assert location(out) == first, "the same content has the same name"
    optimize(save(model, "m2.data", seed=1), out)
    second = location(out)
    assert second != first
    assert set(content_names(tmp_path)) == {"in", "out.onnx", second}
    shutil.copy(out, tmp_path / "copy.old")
    optimize(save(model, "m3.data", seed=2), out)
    assert set(content_names(tmp_path)) == {"in", "out.onnx", location(out), "copy.old", second}
    optimize(save(model, "m4.data", rank=WIDTH), out)
    assert set(content_names(tmp_path)) == {"in", "out.onnx", "m4.data", "copy.old", second}


def content_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_in_place_takes_the_old_data_away(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", "m.onnx.data")
    before = computed(model)
    optimize(model, model, in_place=True)
    assert set(content_names(tmp_path)) == {"m.onnx", location(model)}
    assert location(model) != "m.onnx.data"
    assert np.allclose(computed(model), before, atol=1e-3)


KILLED = """
import os, signal, sys
from pathlib import Path
from onnx_lowrank.publishing import publish, staging
from tests.test_publishing import save
left, out = int(sys.argv[1]), Path(sys.argv[2])
def counted(real):
    def call(path, *given, **named):
        global left
        done = real(path, *given, **named)
        if path.name.startswith("out.onnx"):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return done
    return call
Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)
with staging(out) as staged:
    save(staged, "out.onnx.00000002.data", seed=2)
    publish(staged, out, Path("none"))
"""


@pytest.mark.parametrize("data", ["out.onnx.00000001.data", "out.onnx.data"])
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_while_files_are_put_in_place_leaves_a_whole_output(tmp_path: Path, moment: int, data: str) -> None:
    """After the data, after the model, after the old data is gone; what is nobody's goes with the next run."""
    out = save(tmp_path / "out.onnx", data, seed=1)
    old, new = computed(out), computed(save(tmp_path / "new" / "new.onnx", "new.data", seed=2))
    shutil.rmtree(tmp_path / "new")
    done = subprocess.run([sys.executable, "-c", KILLED, str(moment), str(out)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert np.array_equal(computed(out), old if moment == 1 else new)
    time.sleep(1.1)
    with staging(out):
        pass
    assert set(content_names(tmp_path)) == {"out.onnx", location(out)}
    assert np.array_equal(computed(out), old if moment == 1 else new)


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_publication_leaves_the_previous_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, fault: BaseException
) -> None:
    out = save(tmp_path / "out.onnx", "out.onnx.00000001.data", seed=1)
    before, real, calls = content(tmp_path), os.replace, [0]

    def fail(*given: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == fails_at:
            raise fault
        real(*given, **named)

    with staging(out) as staged:
        save(staged, "out.onnx.00000002.data", seed=2)
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises((LowRankError, KeyboardInterrupt)):
            publish(staged, out, tmp_path / "none")
    assert content(tmp_path) == before
