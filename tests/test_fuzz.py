"""A small budget of the fuzzers in `tools/`: see docs/robustness.md for the long runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("what", "cases", "every"), [("graphs", 150, 10), ("files", 250, 25)])
def test_nothing_is_found(tmp_path: Path, what: str, cases: int, every: int) -> None:
    command = [sys.executable, "tools/fuzz.py", what, "--cases", str(cases), "--seed", "900000", "--every", str(every)]
    command += ["--json", str(tmp_path / "result.json"), "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failures"] == []
    assert done.returncode == 0
    assert sum(result["outcomes"].values()) == cases
    if what == "graphs":
        assert result["outcomes"]["checked"] > cases / 3  # the fuzzer itself still makes sites
