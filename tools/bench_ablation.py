"""What each kind and the refit are worth on zoo models: figures for docs/benchmarks/ablation.json.

python tools/bench_ablation.py ZOO_FOLDER OUT.json NAME=LOSS …      e.g. craft=0.01 minilm=0.04

ZOO_FOLDER holds NAME.onnx and NAME.npz. One calibration and one table of latencies for each model, of every rank that
any kind could take; then a plan is made with everything, with one kind left out in turn, with none but `svd` and
`conv_svd`, without the refit, and without the refit by multiply-adds in place of measured times (`flops`); where
neighbours are multiplied, one more of a calibration without that. Each is built and saved, and the loss of the saved
file measured on held-out data. All saved models are timed turn about with the original in one process, so that their
ratios can be compared.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_rows import run_models, with_ratios

from onnx_lowrank.allocate import Choices
from onnx_lowrank.files import write_model
from onnx_lowrank.planning import choose, decide_plan
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import KIND_NAMES, Settings

EVERYTHING, REFIT, MERGING = "everything", "refit", "merging"
NEWER, TIMES = "all but svd and conv_svd", "refit and measured times"
CLASSIC = ("svd", "conv_svd")


def without(choices: Sequence[Choices], left_out: str) -> list[Choices]:
    """The choices with one kind left out, or all but the classic ones; as they are for anything else."""

    def stays(kind: str) -> bool:
        return kind in CLASSIC if left_out == NEWER else kind != left_out

    return [
        dataclasses.replace(
            choice,
            candidates=tuple(c for c in choice.candidates if stays(c.kind)),
            timed=tuple(c for c in choice.timed if stays(c.kind)),
        )
        for choice in choices
    ]


def used(choices: Sequence[Choices]) -> list[str]:
    """The kinds that any site could take."""
    found = {candidate.kind for choice in choices for candidate in choice.candidates}
    return [kind for kind in KIND_NAMES if kind in found]


def plan_without(run: Run, choices: Sequence[Choices], left_out: str, path: Path) -> dict[str, Any]:
    """Plan, build and save; one row with the loss of the saved file."""
    policy = "flops" if left_out == TIMES else "knapsack"
    settings = dataclasses.replace(run.settings, refit=left_out not in (REFIT, TIMES), policy=policy)
    one = dataclasses.replace(run, settings=settings, frontier=[], warnings=[])
    plan = decide_plan(one, (), without(choices, left_out))
    write_model(one.build(plan.decisions), path, folder=run.loaded.file.folder, external=False)
    kinds: dict[str, int] = {}
    for decision in plan.rewritten:
        kinds[str(decision.kind)] = kinds.get(str(decision.kind), 0) + 1
    loss = run.references.loss(Session(path, threads=0)).value()
    return {"left_out": left_out, "loss": loss, "sites": len(plan.decisions), "kinds": kinds}


def started(model: Path, settings: Settings) -> tuple[Run, list[Choices]]:
    """A calibrated model with the choices of its sites, of every rank that any kind could take."""
    run = start(model, str(model.with_suffix(".npz")), settings, Clock(lambda *_: None))
    every = dataclasses.replace(run, settings=dataclasses.replace(settings, policy="flops"))  # no rank is left out
    return run, choose(every)


def rows_of(model: Path, limit: float) -> list[dict[str, Any]]:
    """One row for everything and for each thing left out: loss, speed-up with its interval, sites by kind."""
    run, choices = started(model, Settings(max_loss=limit, confidence=0.5))
    rows, paths = [], []
    with tempfile.TemporaryDirectory() as folder:

        def add(run: Run, choices: list[Choices], left_out: str) -> None:
            paths.append(Path(folder, f"{left_out}.onnx"))
            rows.append({"model": model.stem, "limit": limit} | plan_without(run, choices, left_out, paths[-1]))
            print(rows[-1], flush=True)

        for left_out in (EVERYTHING, REFIT, TIMES, NEWER, *used(choices)):
            add(run, choices, left_out)
        if run.loaded.merged:
            add(*started(model, Settings(max_loss=limit, confidence=0.5, merge=False)), MERGING)
        return with_ratios(rows, model, paths, run.loaded.feeds[0])


if __name__ == "__main__":
    run_models(rows_of)
