"""What a report says beyond loss and latency: tolerances by output, the noise floor, cold starts, times by node."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnx_lowrank import accuracy, profiles
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.footprint import cold
from onnx_lowrank.profiles import Profile
from onnx_lowrank.runtime import Feed, Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References

_SECONDS = 3.0
_MOST_ROWS = 400

Attempt = Callable[[str, Callable[[], list[dict[str, Any]]]], list[dict[str, Any]]]


def attempting(warnings: list[str]) -> Attempt:
    """Runs a part of the report; a failure is a warning and an empty part, for the figures before it still hold."""

    def attempt(name: str, part: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        try:
            return part()
        except LowRankError as fault:
            warnings.append(f"{name} not measured: {fault}")
            return []

    return attempt


def outputs(label: str, references: References, session: Session) -> list[dict[str, Any]]:
    """A row for each output of a model against the first one's.

    Raises:
        ModelError: the model fails on a sample.
    """
    rows = accuracy.distances(references, references.outputs, session, seconds=_SECONDS)
    return [{"model": label, **row} for row in rows]


def noise_floor(path: Path, label: str, references: References, settings: Settings) -> list[dict[str, Any]]:
    """The original against itself: with less graph optimisation, and on CPU when it runs elsewhere.

    Differences of this size come from the order of sums, not from a rewrite.

    Raises:
        ModelError: it fails there.
    """
    rows = []
    for level, name in (("disable_all", "graph optimisations off"), ("basic", "basic graph optimisations")):
        session = Session(path, provider=settings.provider, threads=0, optimisations=level)
        rows += outputs(f"{label}, {name}", references, session)
    if settings.provider.lower() not in ("cpu", "cpuexecutionprovider"):
        rows += outputs(f"{label}, on cpu", references, Session(path, provider="cpu", threads=0))
    return rows


def cold_starts(
    models: Sequence[tuple[str, Path]], feed: Feed, settings: Settings, seconds: float = 0.0
) -> list[dict[str, Any]]:
    """A row for each model with what a fresh process pays for it.

    Args:
        seconds: further processes are begun for so long; one is enough to say what a start costs about.

    Raises:
        ModelError: a child could not run one.
    """
    return [
        {"model": label, **cold(path, feed, provider=settings.provider, threads=settings.threads, seconds=seconds)}
        for label, path in models
    ]


def profile(model: onnx.ModelProto, feed: Feed, folder: Path, settings: Settings) -> Profile:
    """One model under the runtime's profiler.

    Raises:
        ModelError: it fails, or is too large.
    """
    return profiles.profile_model(model, feed, folder, provider=settings.provider, threads=settings.threads)


def node_rows(before: Profile, after: Profile, kinds: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Times by node of the original, the slowest first; of a very large graph only those."""
    rows = profiles.compared(before, after, kinds)
    return sorted(rows, key=lambda row: -max(row["before_ms"] or 0, row["after_ms"] or 0))[:_MOST_ROWS]


def session_facts(settings: Settings) -> dict[str, Any]:
    """How sessions were made for every timing, and the seed."""
    return {
        "intra_op_threads": settings.threads,
        "inter_op_threads": 1,
        "graph_optimization": "all",
        "execution": "sequential",
        "spinning": True,
        "seed": settings.seed,
    }


def finite(values: Sequence[float]) -> list[float | None]:
    """Numbers as JSON can hold them: null for what is infinite or not a number."""
    return [float(v) if math.isfinite(v) else None for v in values]
