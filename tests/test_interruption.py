"""Killed runs, full disks, folders that cannot be written: OUT is absent, the previous one, or complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.publishing import staging
from onnx_lowrank.saving import write_bytes
from onnx_lowrank.stale import discard_files, discard_folders, disown, own
from tests.interrupts import interrupted

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *words: str, temporary: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ONNX_LOWRANK_CACHE": str(folder / "cache")}
    environment |= {"TMPDIR": str(temporary)} if temporary else {}
    command = [sys.executable, "-m", "onnx_lowrank", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def big_model(path: Path) -> None:
    """Four megabytes of weights that are of no use, and four samples."""
    w = np.zeros((1000, 1000), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="node")
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 1000]) for n in "xy"]
    graph = helper.make_graph([node], "big", ends[:1], ends[1:], [numpy_helper.from_array(w, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(path.with_suffix(".npz"), x=np.ones((4, 1000), np.float32))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=False)


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path: Path, small_disk: Path) -> None:
    big_model(tmp_path / "big.onnx")
    (small_disk / "out.onnx").write_bytes(b"the previous one")
    done = run(tmp_path, "optimize", "big.onnx", "-o", f"{small_disk}/out.onnx", "-d", "big.npz")
    refused(done, "MB free; make room")
    assert (small_disk / "out.onnx").read_bytes() == b"the previous one"
    assert [p.name for p in small_disk.iterdir()] == ["out.onnx"]
    assert not (tmp_path / "cache").exists()  # nothing had been timed yet


def test_a_disk_that_fills_up_leaves_the_previous_output(small_disk: Path) -> None:
    """What is asked for fits, what others write at the same time does not."""
    out = small_disk / "out.onnx"
    out.write_bytes(b"the previous one")
    from onnx_lowrank.errors import SettingsError
    from onnx_lowrank.saving import Part, write_files

    def chunks() -> Iterator[bytes]:
        yield bytes(1 << 20)
        (small_disk / "other").write_bytes(bytes(900 << 10))
        yield bytes(1 << 19)

    with pytest.raises(SettingsError, match="No space left"):
        write_files([Part(out, chunks(), 3 << 19)])
    assert out.read_bytes() == b"the previous one"
    assert {p.name for p in small_disk.iterdir()} == {"out.onnx", "other"}


def test_a_full_disk_for_temporary_files_is_one_line(
    tmp_path: Path, small_disk: Path, low_rank_model: Callable[..., None]
) -> None:
    low_rank_model(tmp_path / "wide.onnx")
    (small_disk / "ballast").write_bytes(bytes((2 << 20) - 8192))
    done = run(tmp_path, "optimize", "wide.onnx", "-o", "out.onnx", "-d", "wide.npz", temporary=small_disk)
    refused(done, "No space left")
    assert {p.name for p in tmp_path.iterdir()} <= {"wide.onnx", "wide.npz", "cache", "small"}


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that is in the middle of writing OUT."""
    code = (
        "import sys, time; from pathlib import Path; from onnx_lowrank.publishing import staging\n"
        "with staging(Path(sys.argv[1])) as staged:\n"
        "    staged.write_bytes(b'half'); print('there', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "out.onnx")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


def test_a_killed_runs_staging_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    """A name with the signs of a glob, too."""
    folder = tmp_path / "a[b]*"
    folder.mkdir()
    killed, living = hold(folder), hold(folder)
    killed.kill()
    killed.communicate()
    (folder / ".out.onnx.mine.staging").mkdir()  # nobody's, but not ours either: it has no lock
    time.sleep(1.1)
    try:
        with staging(folder / "out.onnx"):
            left = list(folder.glob(".out.onnx.*.staging/out.onnx"))
        assert len(left) == 1
        assert (folder / ".out.onnx.mine.staging").is_dir()
    finally:
        living.kill()
        living.communicate()
    time.sleep(1.1)
    discard_folders(folder, ".out.onnx.*.staging")
    assert [p.name for p in folder.iterdir()] == [".out.onnx.mine.staging"]


def test_what_this_process_owns_is_not_removed_until_it_lets_go(tmp_path: Path) -> None:
    (tmp_path / ".x.staging").mkdir()
    handle = own(tmp_path / ".x.staging")
    time.sleep(1.1)
    discard_folders(tmp_path, ".*.staging")
    assert (tmp_path / ".x.staging").is_dir()
    disown(handle)
    discard_folders(tmp_path, ".*.staging")
    assert not (tmp_path / ".x.staging").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".owner").touch()
    (tmp_path / ".x.staging").symlink_to(tmp_path / "kept")
    (tmp_path / ".onnx-lowrank-1.tmp").symlink_to(tmp_path / "kept" / ".owner")
    time.sleep(1.1)
    discard_folders(tmp_path, ".*.staging")
    discard_files(tmp_path, ".onnx-lowrank-*.tmp")
    assert (tmp_path / "kept" / ".owner").exists()


def test_files_that_take_long_to_write_are_not_taken_for_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part looks for what killed runs left; the parts before it, older by now than the limit, are not that."""
    from onnx_lowrank.saving import Part, write_files

    monkeypatch.setattr("onnx_lowrank.stale._AGE", -1.0)
    names = ("out.data", "out.more", "out.onnx")
    written = write_files([Part(tmp_path / name, [name.encode()], 8) for name in names])
    assert written == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_temporary_files_of_a_killed_writer_go_with_the_next_write(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from onnx_lowrank.saving import Part, write_files\n"
        "def chunks():\n    yield b'half'\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_files([Part(Path(sys.argv[1]), chunks(), 8)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.onnx")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    (name,) = [p.name for p in tmp_path.iterdir()]
    assert name.startswith(".onnx-lowrank-")
    time.sleep(1.1)
    write_bytes(tmp_path / "other.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_like_an_interrupt(
    tmp_path: Path, low_rank_model: Callable[..., None], number: signal.Signals
) -> None:
    low_rank_model(tmp_path / "wide.onnx", layers=6)
    code, said = interrupted(tmp_path, "times are kept", number)
    assert (code, "Traceback" in said) == (130, False), said
    assert {p.name for p in tmp_path.iterdir()} <= {"wide.onnx", "wide.npz", "cache"}


def test_random_kills_never_leave_a_part(tmp_path: Path) -> None:
    result = tmp_path / "kills.json"
    command = [sys.executable, "tools/kill_test.py", "--kills", "2", "--seed", "7", "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(result.read_text())["outcomes"].values()) == 2
