"""Whether the 95 % interval of `compare` is honest: a model against itself, many times over.

python tools/aa_calibration.py MODEL.onnx DATA.npz OUT.json [--runs 100] [--load]

Every run is the command line in a process of its own, with its own seed: `onnx-lowrank compare MODEL MODEL`. The
interval should contain 1 in 95 of 100 runs. --load keeps another process busy meanwhile, multiplying matrices larger
than the cache. OUT.json is written after every run and continued when it exists; the machine is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BUSY = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np
a = np.ones((1500, 1500), np.float32)
while True:
    a = a @ a * 1e-3
"""


def command(model: Path, data: Path, seed: int) -> list[str]:
    """One comparison of a model with itself."""
    words = ["compare", str(model), str(model), "--data", str(data), "--brief", "--json", "--seed", str(seed)]
    return [sys.executable, "-m", "onnx_lowrank", *words]


def run(model: Path, data: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ratio with its interval, and the environment."""
    done = subprocess.run(command(model, data, seed), capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    timed = report["models"][1]["latency"]
    row = {"seed": seed, **{key: timed[key] for key in ("ratio", "ratio_ci", "aa_ratio_ci", "clock")}}
    row |= {"p50_ms": timed["before"]["p50_ms"], "sessions": len(timed["rounds_by_session"])}
    return row | {"load_average": round(os.getloadavg()[0], 2)}, report["environment"]


def contains_one(row: dict[str, Any]) -> bool:
    """Whether the interval holds the truth."""
    low, high = row["ratio_ci"]
    return bool(low <= 1 <= high)


def main() -> None:
    """Make the runs that are missing, and print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--load", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    busy = subprocess.Popen([sys.executable, "-c", BUSY]) if given.load else None
    try:
        for seed in range(len(rows), given.runs):
            row, environment = run(given.model, given.data, seed)
            rows.append(row)
            hits = sum(map(contains_one, rows))
            widths = sorted(r["ratio_ci"][1] - r["ratio_ci"][0] for r in rows)
            head = {"model": given.model.stem, "loaded": given.load, "runs": len(rows), "contain_1": hits}
            head |= {"median_width": round(widths[len(widths) // 2], 5)}
            words = command(Path(given.model.name), Path(given.data.name), 0)[3:]
            head |= {"command": " ".join(["onnx-lowrank", *words[:-1], "SEED"]), "environment": environment}
            given.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            print(f"{hits} of {len(rows)} intervals contain 1", flush=True)
    finally:
        if busy is not None:
            busy.kill()


if __name__ == "__main__":
    main()
