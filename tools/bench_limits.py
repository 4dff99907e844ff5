"""Every zoo model at three limits of the loss, and what fresh samples say: figures for docs/benchmarks/limits.json.

python tools/bench_limits.py ZOO_FOLDER OUT.json [--confidence 0.5] [--keep FOLDER] [NAME …]

ZOO_FOLDER holds NAME.onnx and NAME.npz. One calibration a model (`sweep`), one saved file a limit. Each is run on
samples that neither the calibration nor the choice of ranks saw: NAME_fresh.npz, else made with another seed. Rows of
another `--confidence` stand beside those of the default. `--keep` leaves the files in FOLDER, as NAME-LIMIT.onnx, to be
evaluated on their task by zoo_eval.py. `ok` says: not slower than the original beyond the A/A
interval, and at most 1.2 limits lost on them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import zoo_inputs

from onnx_lowrank import pipeline
from onnx_lowrank.compare import compare
from onnx_lowrank.models import CATALOGUE
from onnx_lowrank.models.get import save_inputs
from onnx_lowrank.report import Report, environment
from onnx_lowrank.settings import DEFAULT_CONFIDENCE

_LIMITS = (0.003, 0.01, 0.03)
_OVER = 1.2


def rows_of(model: Path, confidence: float, keep: Path | None) -> list[dict[str, Any]]:
    """One row a limit."""
    makers = {e.name: e.inputs for e in CATALOGUE} | zoo_inputs.MAKERS
    with tempfile.TemporaryDirectory() as scratch:
        folder, fresh = Path(scratch), model.with_name(f"{model.stem}_fresh.npz")
        data = str(model.with_suffix(".npz"))
        reports = pipeline.sweep(model, keep or folder, losses=_LIMITS, data=data, confidence=confidence)
        if not fresh.exists() and model.stem in makers:
            fresh = folder / "fresh.npz"
            save_inputs(fresh, makers[model.stem](model, fresh=True))
        return [_row(model, limit, report, fresh) for limit, report in zip(_LIMITS, reports, strict=True)]


def _row(model: Path, limit: float, report: Report, fresh: Path) -> dict[str, Any]:
    verdict, timed = report.verdict, report.latency[0] if report.latency else None
    lost = None
    if fresh.exists():
        lost = compare([model, Path(report.after.path)], data=str(fresh)).rows[1].loss
    aa = [timed.aa.low, timed.aa.high] if timed else [1.0, 1.0]
    return {
        "model": model.stem,
        "limit": limit,
        "confidence": verdict.confidence,
        "status": verdict.status,
        "speedup": verdict.speedup.value,
        "speedup_ci": [verdict.speedup.low, verdict.speedup.high],
        "aa_ratio_ci": aa,
        "held_out": verdict.samples,
        "loss": verdict.loss,
        "loss_upper": verdict.loss_upper,
        "fresh_loss": lost,
        "additivity": report.additivity,
        "warnings": list(report.warnings),
        "ok": verdict.speedup.high >= aa[0] and (lost is None or lost <= _OVER * limit),
    }


def _key(row: dict[str, Any]) -> tuple[str, float]:
    return row["model"], row.get("confidence", 0.5)


def main() -> None:
    """Run the models that are there, write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="ZOO_FOLDER")
    parser.add_argument("target", type=Path, metavar="OUT.json")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--confidence", type=float, default=DEFAULT_CONFIDENCE, help="as of `optimize` [default: 0.95]")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files stay")
    given = parser.parse_intermixed_args()
    table: dict[str, Any] = json.loads(given.target.read_text()) if given.target.exists() else {"rows": []}
    for model in sorted(given.folder.glob("*.onnx")):
        if (given.names and model.stem not in given.names) or not model.with_suffix(".npz").exists():
            continue
        rows = [row | {"environment": environment()} for row in rows_of(model, given.confidence, given.keep)]
        table["rows"] = [*(row for row in table["rows"] if _key(row) != _key(rows[0])), *rows]
        given.target.write_text(json.dumps(table, indent=1) + "\n")
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
