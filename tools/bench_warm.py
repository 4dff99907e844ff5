"""What a filled cache of latencies is worth: `analyze` twice with one cache, figures for docs/benchmarks/warm.json.

python tools/bench_warm.py ZOO_FOLDER OUT.json NAME …

ZOO_FOLDER holds NAME.onnx and NAME.npz. Every run is the command line in a process of its own. `measuring` are the
stages that time fragments.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from onnx_lowrank.report import environment

MEASURING = ("measure", "layers", "share")


def stages(model: Path, cache: Path) -> dict[str, float]:
    """Seconds of the stages of one run."""
    command = [sys.executable, "-m", "onnx_lowrank", "analyze", str(model), "--data", str(model.with_suffix(".npz"))]
    done = subprocess.run([*command, "--cache", str(cache), "--json"], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)["seconds"]
    return found


def row_of(model: Path) -> dict[str, Any]:
    """The first run and the second."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [stages(model, Path(folder, "cache")) for _ in range(2)]
    spent = [round(sum(run.get(stage, 0.0) for stage in MEASURING), 3) for run in runs]
    whole = [round(sum(run.values()), 1) for run in runs]
    return {"model": model.stem, "measuring": spent, "whole": whole, "times_quicker": round(spent[0] / spent[1], 1)}


def main() -> None:
    """Run the models that are named, write the JSON after each."""
    folder, target, *names = sys.argv[1:]
    table: dict[str, Any] = {"environment": environment(), "rows": []}
    for name in names:
        table["rows"].append(row_of(Path(folder, f"{name}.onnx")))
        Path(target).write_text(json.dumps(table, indent=1) + "\n")
        print(table["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
