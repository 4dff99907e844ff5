"""What a rewritten model loses on the samples that it was fitted to, chosen by, and on fresh ones: figures for docs.

python tools/bench_steered.py OUT.json NAME ORIGINAL.onnx REWRITTEN.onnx DATA.npz FRESH.npz [SAMPLES]

DATA is what REWRITTEN was made with, SAMPLES how many of it (256, as of `optimize`). `far` counts the samples that lose
more than a third of their power.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bench_coverage import Values, errors_and_powers, loss_of

from onnx_lowrank.data import held_out
from onnx_lowrank.report import environment
from onnx_lowrank.settings import Settings

_FAR = 1 / 3


def told(rows: Values) -> dict[str, Any]:
    """Loss of some samples, how many they are, and how many are far off."""
    loss = loss_of(rows)
    far = sum(one > _FAR for one in loss.per_sample)
    return {"samples": len(rows), "loss": loss.value(), "far": far, "most": max(loss.per_sample)}


def main() -> None:
    """Measure, write the JSON beside what is there."""
    target, name, *paths = Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:7])
    original, rewritten, data, fresh = paths
    count = int(sys.argv[7]) if len(sys.argv) > 7 else Settings().samples
    rows = errors_and_powers(original, rewritten, data)[:count]
    apart = np.array([held_out(index) for index in range(len(rows))])
    row = {"model": name, "fitted": told(rows[~apart]), "held_out": told(rows[apart])}
    row |= {"fresh": told(errors_and_powers(original, rewritten, fresh)), "environment": environment()}
    table: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    target.write_text(json.dumps([*(r for r in table if r["model"] != name), row], indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
