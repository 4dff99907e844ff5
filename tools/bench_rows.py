"""What the benchmarks of plans share: one race for all saved models, and a table that grows model by model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import measure
from onnx_lowrank.report import environment
from onnx_lowrank.runtime import Feed

Rows = list[dict[str, Any]]


def with_ratios(rows: Rows, model: Path, paths: Sequence[Path], feed: Feed) -> Rows:
    """The rows with the paired ratio of each saved file to the model, all timed turn about in one process."""
    raced = measure.race([model, *paths], feed, provider="cpu", threads=1, seed=0, seconds=120.0)
    for row, timed in zip(rows, raced, strict=True):
        row |= {"ratio": timed.ratio.value, "ratio_ci": [timed.ratio.low, timed.ratio.high]}
        row |= {"aa_ratio_ci": [timed.aa.low, timed.aa.high], "runs": timed.before["runs"]}
        print(row, flush=True)
    return rows


def run_models(rows_of: Callable[[Path, float], Rows]) -> None:
    """`TOOL ZOO_FOLDER OUT.json NAME=LOSS …`: run the models, write the JSON after each."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    table: dict[str, Any] = {"environment": environment(), "rows": []}
    for word in sys.argv[3:]:
        name, _, limit = word.partition("=")
        table["rows"] += rows_of(folder / f"{name}.onnx", float(limit))
        target.write_text(json.dumps(table, indent=1) + "\n")
