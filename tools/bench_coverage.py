"""How often a limit is exceeded that so many held-out samples let pass: figures for docs/benchmarks/coverage.json.

python tools/bench_coverage.py OUT.json NAME ORIGINAL.onnx REWRITTEN.onnx FRESH.npz

The loss over all of FRESH stands for the true one. Samples are drawn from it with replacement, 2000 times for each
count; a limit that such a draw only just holds is exceeded where the true loss is larger. `over` is how often, `far`
how often by more than a fifth, `price` the median of the limit over the true loss. Both for the upper end that the tool
takes and, under `student`, for Student's, which knows of no skewness.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.special

from onnx_lowrank.data import open_source
from onnx_lowrank.inputs import InputSpec
from onnx_lowrank.metrics import RelativeLoss
from onnx_lowrank.report import environment
from onnx_lowrank.runtime import Session
from onnx_lowrank.validation import standard_error, upper_end

COUNTS, CONFIDENCES, DRAWS = (6, 12, 16, 24, 48, 96), (0.5, 0.9, 0.95), 2000
MOST = 4096

Values = npt.NDArray[np.float64]


def errors_and_powers(original: Path, rewritten: Path, data: Path) -> Values:
    """Σ(y − ŷ)² and Σy² of every sample and output, samples×outputs×2."""
    first, second = Session(original, threads=0), Session(rewritten, threads=0)
    rows, specs = [], [InputSpec(*known) for known in first.inputs()]
    for feed in open_source(specs, str(data), limit=MOST):
        pairs = zip(first.run(feed), second.run(feed, first.output_names), strict=True)
        rows.append([(_power(np.asarray(y) - other), _power(np.asarray(y))) for y, other in pairs])
    return np.array(rows)


def _power(array: npt.NDArray[Any]) -> float:
    return float(np.sum(array.astype(np.float64) ** 2))


def loss_of(rows: Values) -> RelativeLoss:
    """A loss that has counted samples of these errors and powers: one number each has both."""
    loss = RelativeLoss()
    for row in rows:
        y = [np.sqrt(power) for _, power in row]
        loss.add(y, [value + np.sqrt(error) for value, (error, _) in zip(y, row, strict=True)])
    return loss


def table_of(rows: Values, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each count of samples and confidence."""
    true, rng, found = loss_of(rows).value(), np.random.default_rng(seed), []
    for count in COUNTS:
        drawn = [loss_of(rows[rng.integers(0, len(rows), count)]) for _ in range(DRAWS)]
        for confidence in CONFIDENCES:
            quantile = float(scipy.special.stdtrit(count - 1, confidence))
            row = shares([upper_end(loss, confidence) for loss in drawn], true)
            student = shares([loss.value() + quantile * standard_error(loss) for loss in drawn], true)
            found.append({"held_out": count, "confidence": confidence, **row, "student": student})
    return found


def shares(limits: list[float], true: float) -> dict[str, float]:
    """How often a true loss is above such limits, and what they cost."""
    held = np.array(limits)
    known = {"over": np.mean(true > held), "far": np.mean(true > 1.2 * held), "price": np.median(held) / true}
    return {name: round(float(value), 3) for name, value in known.items()}


def main() -> None:
    """Measure, write the JSON beside what is there."""
    target, name, original, rewritten, data = Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:6])
    table: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    rows = errors_and_powers(original, rewritten, data)
    loss = loss_of(rows)
    row = {
        "model": name,
        "samples": len(rows),
        "loss": loss.value(),
        "median_sample": float(np.median(loss.per_sample)),
    }
    row |= {"draws": DRAWS, "table": table_of(rows), "environment": environment()}
    target.write_text(json.dumps([*(r for r in table if r["model"] != name), row], indent=1) + "\n")
    print(json.dumps(row["table"], indent=1))


if __name__ == "__main__":
    main()
