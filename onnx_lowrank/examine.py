"""The saved file of `optimize` beside its original, for the report: outputs, cold starts, times by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx_lowrank import details, profiles
from onnx_lowrank.files import read_model
from onnx_lowrank.run import Run
from onnx_lowrank.runtime import Session
from onnx_lowrank.verify import Measured


def examined(run: Run, staged: Path, found: Measured) -> dict[str, Any]:
    """The parts of the report that nothing is decided by; what cannot be measured is a warning (docs/json.md)."""
    loaded, settings, references = run.loaded, run.settings, run.references
    attempt, original = details.attempting(run.warnings), loaded.file.path

    def tolerances() -> list[dict[str, Any]]:
        session = Session(staged, provider=settings.provider, threads=0, purpose="verify")
        return details.outputs("rewritten", references, session)

    accuracy = {
        "accuracy": [
            *attempt("accuracy by output", tolerances),
            *attempt("noise floor", lambda: details.noise_floor(original, "original", references, settings)),
        ],
        "sample_losses": details.finite(found.sample_losses),
    }
    if not settings.verify_latency:  # times of this machine say nothing about the one that was planned for
        return accuracy
    models = [("original", original), ("rewritten", staged)]
    nodes, fusions = _nodes(run, staged, attempt)
    return {
        **accuracy,
        "cold": attempt("cold start", lambda: details.cold_starts(models, loaded.feeds[0], settings)),
        "profile": nodes,
        "fusions": fusions,
        "session": details.session_facts(settings),
    }


def _nodes(run: Run, staged: Path, attempt: details.Attempt) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Times by node of the original, and the fusions of both graphs."""
    original, folder, feed = run.loaded.opening.original, run.loaded.file.folder, run.loaded.feeds[0]
    fused: list[dict[str, Any]] = []

    def rows() -> list[dict[str, Any]]:
        saved = read_model(staged)
        before = details.profile(original, feed, folder, run.settings)
        after = details.profile(saved.model, feed, saved.folder, run.settings)
        fused.extend(profiles.fusions(before, after))
        return details.node_rows(before, after, profiles.kinds(saved.model))

    return attempt("profile by node", rows), fused
