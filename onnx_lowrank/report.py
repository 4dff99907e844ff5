"""What happened, as one frozen value: table, JSON and exit code are views of it."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnx_lowrank import runtime
from onnx_lowrank.evidence import ERRORS, Evidence
from onnx_lowrank.latency import processor
from onnx_lowrank.measure import Latency
from onnx_lowrank.plan import Decision, Plan
from onnx_lowrank.sites import Keep
from onnx_lowrank.timing import Ratio


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """A model file in four numbers; multiply-adds are those of its linear nodes on the timed sample."""

    path: str
    sha256: str
    bytes: int
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was measured on the saved file; `loss_limit` is None when the goal was a speed or a size.

    Attributes:
        loss_upper: what the loss is below with 95 % confidence; None where the samples do not tell.
        confidence: how sure `loss_limit` was held to.
        latency: `measured`, or `predicted` from the table of a `machine` that is not here.
        scope: what a predicted speed-up is about.
        over_precision: the gain of low rank over the precision alone, where one was asked for.
    """

    status: str
    reason: str
    speedup: Ratio
    loss: float
    loss_limit: float | None
    data: str
    samples: int
    provider: str
    precision: str
    loss_upper: float | None = None
    confidence: float = 0.5
    metric: str = "relative"
    provider_options: dict[str, str] = dataclasses.field(default_factory=dict)
    latency: str = "measured"
    machine: str | None = None
    scope: str = ""
    over_precision: Ratio | None = None

    def sentence(self) -> str:
        """The verdict as people read it."""
        if self.status == "unchanged":
            return f"Unchanged: {self.reason}."
        where = "synthetic inputs, not on real data" if self.data == "synthetic" else "held-out samples"
        if self.latency == "predicted":
            source = f"the table of {self.machine}" if self.machine else "the plan"
            return (
                f"{self.speedup.value:.2f}× faster on {self.provider} as predicted from {source} for {self.scope}; "
                f"nothing was timed. {self._loss().capitalize()}, measured on {self.samples} {where}."
            )
        return (
            f"{self.speedup.value:.2f}× faster (95 % interval {self.speedup.low:.2f}–{self.speedup.high:.2f}) on "
            f"{self.provider}{self._made()}, {self._loss()}, "
            f"measured on {self.samples} {where}."
        )

    def _made(self) -> str:
        """The precision that was asked for, and what low rank adds to it."""
        if self.over_precision is None:
            return f" in {self.precision}" if self.precision.startswith(("int8", "fp16")) else ""
        over, name = self.over_precision, self.precision.split()[0]
        return f" in {self.precision}, {over.value:.2f}× ({over.low:.2f}–{over.high:.2f}) faster than {name} alone"

    def _loss(self) -> str:
        name = "loss" if self.metric == "relative" else f"{self.metric} loss"
        allowed = f" of {self.loss_limit:.2g} allowed" if self.loss_limit is not None else ""
        below = f" (below {self.loss_upper:.2g} with 95 % confidence)" if self.loss_upper is not None else ""
        return f"{name} {self.loss:.2g}{allowed}{below}"


_VERDICT = (
    *("loss", "loss_upper", "loss_limit", "confidence", "metric", "data", "samples", "provider", "precision", "reason"),
    *("latency", "machine", "scope", "provider_options"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a run. True when OUT is a rewritten model."""

    verdict: Verdict
    before: ModelFacts
    after: ModelFacts
    plan: Plan
    kept: tuple[Keep, ...]
    frontier: tuple[dict[str, Any], ...]
    latency: tuple[Latency, ...]
    staircases: dict[str, dict[str, float]]
    seconds: dict[str, float]
    command: str
    warnings: tuple[str, ...]
    additivity: dict[str, Any] = dataclasses.field(default_factory=dict)
    probes: dict[str, Any] = dataclasses.field(default_factory=dict)
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    precisions: tuple[dict[str, Any], ...] = ()
    ways: tuple[dict[str, Any], ...] = ()
    merged: tuple[dict[str, Any], ...] = ()
    evidence: Mapping[str, Evidence] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: onnx.ModelProto | None = dataclasses.field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return self.verdict.status == "optimized"

    def to_dict(self) -> dict[str, Any]:
        """Stable keys, schema 1 (docs/json.md)."""
        v = self.verdict
        return {
            "schema": 1,
            "status": v.status,
            "verdict": {
                "speedup": v.speedup.value,
                "speedup_ci": [v.speedup.low, v.speedup.high] if v.latency == "measured" else None,
                **{k: getattr(v, k) for k in _VERDICT},
            },
            "model": {"before": dataclasses.asdict(self.before), "after": dataclasses.asdict(self.after)},
            "sites": [{**_site(d), **_basis(self.evidence.get(d.node))} for d in self.plan.decisions],
            "kept": _counts(self.kept),
            "merged": list(self.merged),
            "latency": [entry.to_dict() for entry in self.latency],
            "pareto": list(self.frontier),
            "additivity": self.additivity,
            "probes": self.probes,
            "precisions": list(self.precisions),
            "ways": [_way(way) for way in self.ways],
            "policy": self.plan.policy,
            "staircases": self.staircases,
            "environment": environment() | self.hardware,
            "seconds": self.seconds,
            "command": self.command,
            "warnings": list(self.warnings),
            **self.details,
        }


def _site(decision: Decision) -> dict[str, Any]:
    row = dataclasses.asdict(decision)
    why = row.pop("why")
    row["reason"] = why.value if why else None
    row["shape"], row["tied"] = list(decision.shape), list(decision.tied)
    return row


def _basis(known: Evidence | None) -> dict[str, Any]:
    """How much a site's fit stands on; null where the site was not fitted."""
    if known is None:
        return {"positions": None, "effective_rank": None, "patches": None, "spectrum": []}
    return {
        "positions": known.positions,
        "effective_rank": round(known.effective_rank, 2),
        "patches": known.patches or None,
        "spectrum": [[error, rank] for error, rank in zip(ERRORS, known.ranks, strict=False)],
    }


def _way(way: dict[str, Any]) -> dict[str, Any]:
    """A measured way to a precision; what was not timed is null."""
    return {**way["scheme"], **{k: way[k] if np.isfinite(way[k]) else None for k in ("loss", "ms")}}


def _counts(kept: tuple[Keep, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for keep in kept:
        counts[keep.why.value] = counts.get(keep.why.value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def environment() -> dict[str, Any]:
    """Machine and versions that the figures belong to."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "runtime": runtime.version(),
        "onnx": onnx.__version__,
        "numpy": np.__version__,
    }
