"""Every policy at equal loss on zoo models: figures for docs/benchmarks/policies.json.

python tools/bench_policies.py ZOO_FOLDER OUT.json NAME=LOSS …      e.g. craft=0.01 minilm=0.02 vgg16=0.01

ZOO_FOLDER holds NAME.onnx and NAME.npz. One calibration and one table of latencies for each model; every policy
chooses on them within the loss, without a refit. Its plan is built and saved, and the loss of the saved file measured
on held-out data. All saved models are then timed turn about with the original in one process, so that their ratios
can be compared.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from bench_rows import run_models, with_ratios

from onnx_lowrank.files import write_model
from onnx_lowrank.planning import choose, decide_plan
from onnx_lowrank.run import Clock, start
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import POLICY_NAMES, Settings


def rows_of(model: Path, limit: float) -> list[dict[str, Any]]:
    """One row a policy: loss on held-out samples, speed-up with its interval, sites rewritten."""
    # every timed site is probed, nothing is repaired, and the measured loss itself is what is made equal
    settings = Settings(max_loss=limit, confidence=0.5, policy="flops", refit=False)
    run = start(model, str(model.with_suffix(".npz")), settings, Clock(lambda *_: None))
    choices = choose(run)
    rows, paths = [], []
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICY_NAMES:
            one = dataclasses.replace(run, settings=dataclasses.replace(settings, policy=policy), frontier=[])
            plan = decide_plan(one, (), list(choices))
            path = Path(folder, f"{policy}.onnx")
            write_model(one.build(plan.decisions), path, folder=model.parent, external=False)
            loss = run.references.loss(Session(path, threads=0)).value()
            row = {"model": model.stem, "limit": limit, "policy": policy, "loss": loss}
            rows.append(row | {"rewritten": len(plan.rewritten), "sites": len(plan.decisions)})
            paths.append(path)
            print(rows[-1], flush=True)
        return with_ratios(rows, model, paths, run.loaded.feeds[0])


if __name__ == "__main__":
    run_models(rows_of)
