"""What was freed goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.memory import give_back


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_freed_memory_goes_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    small = [np.ones(12_000) for _ in range(3000)]  # 96 kB each: below the size that is mapped on its own
    last = np.ones(12_000)  # above them on the heap, so that its end cannot just be cut off
    held = resident()
    small.clear()
    give_back()
    assert resident() < held - (100 << 20)
    assert last.sum() == 12_000


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("onnx_lowrank.memory.ctypes.CDLL", missing)
    give_back()
