"""Temporary folders: gone with their owner, after SIGKILL at the next start; those of a living run stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from onnx_lowrank.scratch import scratch
from onnx_lowrank.stale import LOCK

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import time
from onnx_lowrank.scratch import Folder
folder = Folder()
(folder.path / "large.npz").write_bytes(b"many samples")
print(folder.path, flush=True)
time.sleep(600)
"""


def hold(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_runs_folder_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    (killed, left), (living, kept) = hold(tmp_path), hold(tmp_path)
    foreign = tmp_path / "onnx-lowrank-mine"
    foreign.mkdir()  # no lock: not ours
    try:
        killed.kill()
        killed.communicate()
        assert (left / "large.npz").exists()
        time.sleep(1.1)
        third, own = hold(tmp_path)
        assert set(tmp_path.iterdir()) == {kept, own, foreign}
        assert (kept / "large.npz").exists()
        third.terminate()
        third.communicate()
    finally:
        living.kill()
        living.communicate()


def test_a_folder_goes_with_its_block() -> None:
    with scratch() as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_a_killed_run_leaves_nothing_behind_the_next(tmp_path: Path, low_rank_model: Callable[..., None]) -> None:
    """All that a whole run puts into the folder of temporary files."""
    low_rank_model(tmp_path / "wide.onnx", layers=1, width=64)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "onnx_lowrank", "analyze", "wide.onnx", "-d", "wide.npz", "--cache", "cache", "-q"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while first.poll() is None and len(list(temporary.glob("onnx-lowrank-*"))) < 2:  # samples and references
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert list(temporary.glob("onnx-lowrank-*"))
    time.sleep(1.1)
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert second.returncode == 0, second.stderr
    assert list(temporary.glob("onnx-lowrank-*")) == []
