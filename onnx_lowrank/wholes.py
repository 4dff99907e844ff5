"""Whole models timed: the original against a built plan, in the precision that will be deployed; kept in the table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx

from onnx_lowrank import insitu, measure
from onnx_lowrank.plan import Decision
from onnx_lowrank.prediction import situation
from onnx_lowrank.run import Run
from onnx_lowrank.runtime import node_times

Decisions = tuple[Decision, ...]


def precision_alone(run: Run) -> float:
    """Time of the original in the precision that will be deployed, with its neighbours merged, over its own."""
    if run.lowering is None and not run.loaded.merged:
        return 1.0
    times = run.table.recall(f"alone {digest(run, ())}", lambda: _race(run, run.loaded.file.path, ()))
    return times["after"] / times["before"]


def whole(run: Run, decisions: Decisions) -> dict[str, float]:
    """Milliseconds of the original, merged and in the precision, and of a built plan, turn about; kept in the table."""
    plain = run.lowering is None and not run.loaded.merged
    first = run.loaded.file.path if plain else run.deployed(())
    return run.table.recall(f"model {digest(run, decisions)}", lambda: _race(run, first, decisions))


def _race(run: Run, first: Path | onnx.ModelProto, decisions: Decisions) -> dict[str, float]:
    return measure.quick_race(
        first,
        run.deployed(decisions),
        run.loaded.feeds,
        provider=run.settings.provider,
        threads=run.settings.threads,
        seed=run.settings.seed,
        folder=run.loaded.file.folder,
    )


def factors(run: Run, decisions: Decisions) -> dict[str, tuple[float, float]]:
    """In-situ over predicted times of the rewritten sites, in the measure of the whole models'."""
    timed = whole(run, decisions)

    def before() -> dict[str, float]:
        return insitu.dense_times(run.loaded, run.settings, run.lowering, timed["before"])

    dense = run.table.recall(f"in situ {digest(run, ())}", before)

    def rewritten() -> dict[str, float]:
        times = node_times(
            run.deployed(decisions),
            run.loaded.feeds[0],
            run.loaded.file.folder,
            provider=run.settings.provider,
            threads=run.settings.threads,
        )
        return insitu.by_site(insitu.stretched(times, timed["after"]), run.loaded.sites, insitu.tails(run.loaded))

    return insitu.factors(decisions, dense, run.table.recall(f"in situ {digest(run, decisions)}", rewritten))


def digest(run: Run, decisions: Sequence[Decision]) -> str:
    """What the time of a built plan depends on, as a short hash."""
    chosen = [(d.node, d.kind, d.rank, d.inner) for d in decisions if d.kind]
    made = f" {run.lowering.scheme}" if run.lowering else ""
    merged = "".join(f" {one.taken_in}>{one.node}" for one in run.loaded.merged)
    text = f"{situation(run)} {chosen}{made}{merged}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
