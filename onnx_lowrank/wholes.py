"""Whole models timed: the original against a built plan, in the precision that will be deployed; kept in the table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from onnx_lowrank import insitu, measure
from onnx_lowrank.allocate import predicted_ms
from onnx_lowrank.plan import Decision
from onnx_lowrank.prediction import situation, whole_key
from onnx_lowrank.providers import Provider
from onnx_lowrank.run import Run

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
    """In-situ over predicted times of the rewritten sites, with the pace of the race divided out.

    What stays dense keeps the table's times, and the knapsack compares the two.
    """
    timed = whole(run, decisions)

    def rewritten() -> dict[str, float]:
        return insitu.shares(run.deployed(decisions), run.loaded, run.settings)

    after = run.table.recall(f"shares {digest(run, decisions)}", rewritten)
    new = {node: share * timed["after"] for node, share in after.items()}
    dense = _dense(run, timed["before"])
    pace = _pace(run, decisions, dense)
    found = insitu.factors(decisions, dense, new)
    return {node: (before / pace, after / pace) for node, (before, after) in found.items()}


def predicted(run: Run, decisions: Decisions) -> float:
    """Milliseconds of a built plan by the sum of what its sites save, at the pace of the whole models' race."""
    before = whole(run, decisions)["before"]
    return before - _pace(run, decisions, _dense(run, before)) * predicted_ms(decisions)


def _pace(run: Run, decisions: Decisions, dense: Mapping[str, float]) -> float:
    """On a card, whose profile shows launches, the pace is taken for that of the fragments."""
    on_card = Provider.of(run.settings.provider).on_device
    return 1.0 if on_card else insitu.pace(decisions, dense)


def additivity(run: Run, decisions: Decisions, corrected: int = 0) -> dict[str, float]:
    """The whole model's milliseconds before, predicted and measured for a plan; nothing for one that is all dense.

    Args:
        corrected: sites whose times the profile has corrected.
    """
    if not any(d.kind for d in decisions):
        return {}
    times = whole(run, decisions)
    run.table.recall(whole_key(run), lambda: {"ms": times["before"]})
    return {
        "before_ms": times["before"],
        "predicted_ms": predicted(run, decisions),
        "measured_ms": times["after"],
        "corrected_sites": corrected,
    }


def _dense(run: Run, whole_ms: float) -> dict[str, float]:
    """Milliseconds of every site's own weight in an original that takes so many."""
    key = f"shares {digest(run, ())}"
    found = run.table.recall(key, lambda: insitu.dense_shares(run.loaded, run.settings, run.lowering))
    return {node: share * whole_ms for node, share in found.items()}


def digest(run: Run, decisions: Sequence[Decision]) -> str:
    """What the time of a built plan depends on, as a short hash."""
    chosen = [(d.node, d.kind, d.rank, d.inner) for d in decisions if d.kind]
    made = f" {run.lowering.scheme}" if run.lowering else ""
    merged = "".join(f" {one.taken_in}>{one.node}" for one in run.loaded.merged)
    text = f"{situation(run)} {chosen}{made}{merged}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
