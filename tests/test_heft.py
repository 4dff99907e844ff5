"""Heavy models: weights used where they lie, timed sessions one at a time; light ones as ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_lowrank import heft, measure, sessions
from onnx_lowrank.files import read_model, write_model
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.rewrite import dense_patch
from onnx_lowrank.runtime import Session

LAYERS, WIDTH = 6, 1001  # not a whole number of pages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 MB of weights in a data file, from an offset on that is no page's."""
    folder, rng = tmp_path_factory.mktemp("heft"), np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    with (folder / "weights.bin").open("wb") as data:
        data.write(bytes(1024))
        for i in range(LAYERS):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", data.tell()), ("length", 4 * WIDTH**2)):
                tensor.external_data.add(key=key, value=str(value))
            data.write((rng.standard_normal((WIDTH, WIDTH), np.float32) / 30).tobytes())
            tensors.append(tensor)
            nodes += [helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"], name=f"layer{i}"),
                      helper.make_node("Tanh", [f"m{i}"], [f"y{i}"])]  # fmt: skip
            name = f"y{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "deep.onnx")
    return folder / "deep.onnx"


def test_the_weights_in_data_files_make_a_model_heavy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * LAYERS * WIDTH**2
    proto = read_model(model).model
    assert heft.external_bytes(model) == heft.external_bytes(proto) == weights
    assert not heft.is_mapped(model)
    assert not heft.is_heavy(model)
    monkeypatch.setattr(heft, "HEAVY", weights)
    assert heft.is_mapped(model)
    assert heft.is_mapped(proto)
    assert heft.is_heavy(model)
    monkeypatch.setattr(heft, "HEAVY", weights + 1)
    assert not heft.is_mapped(model)
    assert heft.is_heavy(model)  # with its own bytes


def test_weights_inside_the_file_cannot_be_mapped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, inside = read_model(model), tmp_path / "inside.onnx"
    write_model(file.model, inside, folder=file.folder, external=False)
    monkeypatch.setattr(heft, "HEAVY", 1 << 20)
    assert heft.is_heavy(inside)
    assert heft.external_bytes(inside) == 0


@pytest.mark.parametrize("broken", ["missing.onnx", "broken.onnx"])
def test_what_cannot_be_read_is_left_to_others(broken: str, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 64)
    assert heft.external_bytes(tmp_path / broken) == 0


@pytest.mark.parametrize("spin", [False, True])
def test_only_sessions_that_are_not_timed_use_the_file(
    model: Path, spin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(prepack: bool | None = None) -> bool:
        options = Session(model, spin=spin, prepack=prepack)._session.get_session_options()
        try:
            return bool(options.get_session_config_entry("session.disable_prepacking") != "1")
        except RuntimeError:
            return True

    assert packed()
    monkeypatch.setattr(heft, "HEAVY", 1 << 20)
    assert packed() is spin
    assert not packed(False)
    assert packed(True)


def test_both_ways_compute_the_same(model: Path) -> None:
    feed = {"x": np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)}
    (one,), (other,) = (Session(model, prepack=prepack).run(feed) for prepack in (True, False))
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * float(np.abs(one).max()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("path", [True, False])
def test_mapped_weights_take_no_memory_of_the_process(model: Path, path: bool) -> None:
    code = f"""
import re, numpy as np
from pathlib import Path
from onnx_lowrank import heft
from onnx_lowrank.files import read_model
from onnx_lowrank.runtime import Session, load
load()
file, feed = read_model(Path({str(model)!r})), {{"x": np.ones((2, {WIDTH}), np.float32)}}
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def opened():
    session = Session({"file.path" if path else "file.model, folder=file.folder"})
    session.run(feed)
    return session
before = anonymous()
heft.HEAVY = 1 << 20
mapped = opened()
between = anonymous()
heft.HEAVY = 1 << 30
packed = opened()
print(between - before, anonymous() - between)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mapped, packed = map(int, done.stdout.split())
    assert mapped < 4 << 20 < 16 << 20 < packed


def test_a_written_out_weight_refers_to_the_bytes_of_the_original(model: Path, tmp_path: Path) -> None:
    file = read_model(model)
    graph = Graph(file.model, file.folder)
    site = survey(graph).sites[2]
    names = graph.apply(dense_patch(site, "probe"))
    built = graph.commit()
    assert built.ByteSize() < 1 << 16
    (there,) = [t for t in built.graph.initializer if t.name == names["dense.weight"]]
    assert there.external_data == file.model.graph.initializer[2].external_data
    feed = {"x": np.ones((2, WIDTH), np.float32)}
    one, other = Session(built, folder=file.folder).run(feed)[0], Session(model).run(feed)[0]
    assert np.array_equal(one, other)
    write_model(built, tmp_path / "out.onnx", folder=file.folder, external=True)
    assert np.array_equal(Session(tmp_path / "out.onnx").run(feed)[0], other)


def test_heavy_models_are_open_one_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a race and in a quick one; ratios and the control are there as ever."""
    most = counting(monkeypatch)
    feed, where = {"x": np.ones((1, WIDTH), np.float32)}, {"provider": "cpu", "threads": 1, "seed": 0}
    file = read_model(model)
    asked = {**where, "seconds": 0.1, "folder": file.folder}
    measure.quick_race(model, file.model, [feed], **asked)  # type: ignore[arg-type]
    measure.race([model, file.model], feed, **asked)  # type: ignore[arg-type]
    assert most() == 3
    monkeypatch.setattr(heft, "HEAVY", 1 << 20)
    most = counting(monkeypatch)
    found = measure.quick_race(model, file.model, [feed], **asked)  # type: ignore[arg-type]
    (latency,) = measure.race([model, file.model], feed, streams=2, **asked)  # type: ignore[arg-type]
    assert most() == 1
    assert found["before"] > 0 < found["after"]
    assert latency.ratio.low <= latency.ratio.value <= latency.ratio.high
    assert len(latency.groups) >= sessions.LEAST_GROUPS
    assert len(latency.again) == len(latency.before["samples_ms"]) == sum(latency.groups)
    assert latency.before["streams_per_second"] > 0


def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many sessions were open at the same time, at most, since the call."""
    opened, now, most = Session.__init__, [0], [0]

    def count(self: Session, *given: object, **named: object) -> None:
        opened(self, *given, **named)  # type: ignore[arg-type]
        now[0] += 1
        most[0] = max(most[0], now[0])

    def uncount(self: Session) -> None:
        del self
        now[0] -= 1

    monkeypatch.setattr(Session, "__init__", count)
    monkeypatch.setattr(Session, "__del__", uncount, raising=False)
    return lambda: most[0]


def test_apart_a_constant_factor_is_found_and_drift_is_in_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that grow while the models are timed one after the other: the ratio's interval holds the true one."""
    clock, factor = [0.0], {0: 1.0, 1: 1.0, 2: 0.8}
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("time.thread_time", lambda: clock[0])
    monkeypatch.setattr(sessions, "_fixed_computation", lambda: 1.0)

    def opener(index: int) -> sessions.Opener:
        def run() -> None:
            clock[0] += factor[index] * (1 + 0.002 * clock[0])

        return lambda: run

    found = sessions.race([opener(i) for i in range(3)], seconds=60, seed=0, apart=True)
    times = found.samples.wall
    assert times.shape == (sum(found.groups), 3)
    assert all(rounds >= 2 for rounds in found.groups)
    ratio = sessions.ratio(times[:, 1], times[:, 2], found.groups, times[:, 0])
    assert ratio.low <= 1.25 <= ratio.high
    assert sessions.ratio(times[:, 0], times[:, 1], found.groups).low <= 1
