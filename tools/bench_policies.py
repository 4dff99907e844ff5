"""Every policy at equal loss on zoo models: figures for docs/benchmarks/policies.json.

python tools/bench_policies.py ZOO_FOLDER OUT.json NAME=LOSS …      e.g. craft=0.01 minilm=0.02 vgg16=0.01

ZOO_FOLDER holds NAME.onnx and NAME.npz. One calibration and one table of latencies for each model; every policy
chooses on them, its plan is built, saved, and verified as `optimize` does. All saved models of a policy round are then
timed turn about against the original in one process, so that the ratios can be compared with each other.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from onnx_lowrank import measure
from onnx_lowrank.outcome import finish
from onnx_lowrank.planning import choose, decide_plan
from onnx_lowrank.report import environment
from onnx_lowrank.run import Clock, start
from onnx_lowrank.settings import POLICY_NAMES, Settings


def rows_of(model: Path, limit: float, cache: Path) -> list[dict[str, Any]]:
    """One row a policy: loss, speed-up with its interval against the original, sites rewritten."""
    settings = Settings(max_loss=limit, cache=cache, policy="flops")  # so that every timed site is probed
    run = start(model, str(model.with_suffix(".npz")), settings, Clock(lambda *_: None))
    choices = choose(run)
    found: list[tuple[str, Path | None, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICY_NAMES:
            one = dataclasses.replace(
                run, settings=dataclasses.replace(settings, policy=policy), frontier=[], warnings=[]
            )
            plan = decide_plan(one, (), list(choices))
            out = Path(folder, f"{policy}.onnx")
            report = finish(one, plan, out, None, "", give_back=policy == "knapsack", hold_speed=False)
            row = {"model": model.stem, "limit": limit, "policy": policy, "loss": report.verdict.loss}
            row |= {"sites": len(report.plan.rewritten), "status": report.status, "parameters": report.after.parameters}
            found.append((policy, out if report else None, row))
            print(model.stem, policy, report.verdict.speedup, report.verdict.loss, flush=True)
        paths = [path for _, path, _ in found if path is not None]
        raced = measure.race([model, *paths], run.loaded.feeds[0], provider="cpu", threads=1, seed=0, seconds=90.0)
        ratios = dict(zip(paths, raced, strict=True))
        for _, path, row in found:
            timed = ratios[path] if path is not None else None
            row["ratio"] = timed.ratio.value if timed else 1.0
            row["ratio_ci"] = [timed.ratio.low, timed.ratio.high] if timed else [1.0, 1.0]
            row["aa_ratio_ci"] = [timed.aa.low, timed.aa.high] if timed else None
    return [row for _, _, row in found]


def main() -> None:
    """Run the models, write the JSON after each."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    table: dict[str, Any] = {"environment": environment(), "rows": []}
    with tempfile.TemporaryDirectory() as cache:
        for word in sys.argv[3:]:
            name, _, limit = word.partition("=")
            table["rows"] += rows_of(folder / f"{name}.onnx", float(limit), Path(cache))
            target.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
