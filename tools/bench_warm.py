"""What a filled cache of latencies is worth: `analyze` twice with one cache, figures for docs/benchmarks/warm.json.

python tools/bench_warm.py ZOO_FOLDER OUT.json NAME … [-- OPTION …]

ZOO_FOLDER holds NAME.onnx and NAME.npz. Every run is the command line in a process of its own; options after `--` are
passed on (`--samples 8 --no-refit` shortens the other stages). `measuring` are the stages that time fragments.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_optimize import split_options

from onnx_lowrank.report import environment

MEASURING = ("measure", "layers", "share")


def stages(model: Path, cache: Path, options: list[str]) -> dict[str, float]:
    """Seconds of the stages of one run."""
    command = [sys.executable, "-m", "onnx_lowrank", "analyze", str(model), "--data", str(model.with_suffix(".npz"))]
    given = [*options, "--cache", str(cache), "--json"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)["seconds"]
    return found


def row_of(model: Path, options: list[str]) -> dict[str, Any]:
    """The first run and the second."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [stages(model, Path(folder, "cache"), options) for _ in range(2)]
    spent = [round(sum(run.get(stage, 0.0) for stage in MEASURING), 3) for run in runs]
    whole = [round(sum(run.values()), 1) for run in runs]
    found = {"measuring": spent, "whole": whole, "times_quicker": round(spent[0] / spent[1], 1)}
    return {"model": model.stem, "options": options, **found, "environment": environment()}


def main() -> None:
    """Run the models that are named, write the JSON after each."""
    folder, out, *rest = sys.argv[1:]
    (names, options), target = split_options(rest), Path(out)
    rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    for name in names:
        row = row_of(Path(folder, f"{name}.onnx"), options)
        rows = [*(r for r in rows if r["model"] != name), row]
        target.write_text(json.dumps(rows, indent=1) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
