"""The part `latency` of tools/gpu_suite.py: dense against low rank, paired, and what each group of kinds gains."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import random_models
from gpu_parts import Items, Suite

from onnx_lowrank import measure, pipeline
from onnx_lowrank.allocate import Choices
from onnx_lowrank.files import write_model
from onnx_lowrank.hardware import card
from onnx_lowrank.placement import placed
from onnx_lowrank.planning import choose, decide_plan
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings

PRESERVING = ("nystrom",)
"""Kinds that add no node: depth costs most on a card."""

GROUPS: Mapping[str, Callable[[str], bool]] = {
    "all": lambda kind: bool(kind),
    "depth_preserving": lambda kind: kind in PRESERVING,
    "depth_adding": lambda kind: kind not in PRESERVING,
}
LOSS = 0.01


def latency(suite: Suite) -> Items:
    """Paired ratios of dense and low rank, and what each group of kinds gains alone."""
    batches = (2,) if suite.dry else (1, 32)
    for batch in batches:
        for name in suite.models:
            for precision in ("fp32",) if suite.dry else ("fp32", "fp16"):
                yield f"{name} {precision} b{batch}", functools.partial(paired, suite, name, precision, batch)


def precisions(suite: Suite) -> Items:
    """The four models of `--precision int8`: dense, quantised, low rank, both; as the report has them."""
    for batch in (2,) if suite.dry else (1, 32):
        for name in ("resnet50",) if suite.dry else suite.models:
            yield f"{name} int8 b{batch}", functools.partial(four_ways, suite, name, batch)


def four_ways(suite: Suite, name: str, batch: int) -> dict[str, Any]:
    """One `optimize` in int8; its four columns, the ways to int8 that were measured, and the verdict."""
    with tempfile.TemporaryDirectory() as folder:
        report = pipeline.optimize(
            suite.model(name, "fp32"), Path(folder, "out.onnx"), data=suite.data(name, 8 if suite.dry else 32),
            provider=str(suite.provider), provider_options=suite.provider.options, precision="int8", max_loss=LOSS,
            samples=8 if suite.dry else 32, shapes=(suite.shapes(name, batch),), refit=False,
            cache=suite.out / "tables",
        ).to_dict()  # fmt: skip
    found = {key: report[key] for key in ("status", "verdict", "precisions", "ways", "warnings")}
    return {"batch": batch, "trained": name not in random_models.MODELS, **found}


def paired(suite: Suite, name: str, precision: str, batch: int) -> dict[str, Any]:
    """One calibration and one table; a plan, a saved file and a paired timing for each group of kinds."""
    settings = Settings(
        provider=str(suite.provider), provider_options=suite.provider.options, max_loss=LOSS,
        samples=8 if suite.dry else 32, shapes=(suite.shapes(name, batch),), cache=suite.out / "tables", refit=False,
    )  # fmt: skip
    run = start(suite.model(name, precision), suite.data(name, settings.samples), settings, Clock(lambda *_: None))
    choices = choose(run)
    groups = {group: of_group(run, choices, allowed, 0.1 if suite.dry else 3.0) for group, allowed in GROUPS.items()}
    gains = {group: 1 - 1 / found["ratio"] for group, found in groups.items()}
    shares = {group: gain / gains["all"] if gains["all"] > 0 else None for group, gain in gains.items()}
    low_rank = {**groups["all"], "share_of_gain": {group: shares[group] for group in GROUPS if group != "all"}}
    trained = name not in random_models.MODELS
    return {"batch": batch, "precision": precision, "trained": trained, "loss_limit": LOSS, "low_rank": low_rank,
            "groups": groups}  # fmt: skip


def of_group(run: Run, choices: list[Choices], allowed: Callable[[str], bool], seconds: float) -> dict[str, Any]:
    """What the kinds of a group make of the model: planned, built, saved, then loss and paired time of the file.

    The ratio is 1 where nothing is planned, and where the file is not faster or loses too much: such a model is not
    written. `measured` says what it would have been.
    """
    mine = [
        dataclasses.replace(
            c,
            candidates=tuple(k for k in c.candidates if allowed(k.kind)),
            timed=tuple(k for k in c.timed if allowed(k.kind)),
        )
        for c in choices
    ]
    one = dataclasses.replace(run, frontier=[], warnings=list(run.warnings), additivity={})
    plan = decide_plan(one, (), mine)
    kinds: dict[str, int] = {}
    for decision in plan.decisions:
        kinds[decision.kind or "dense"] = kinds.get(decision.kind or "dense", 0) + 1
    found: dict[str, Any] = {"status": "unchanged", "ratio": 1.0, "loss": 0.0, "kinds": kinds}
    if not plan.rewritten:
        return found
    settings, loaded = run.settings, run.loaded
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.onnx")
        write_model(one.build(plan.decisions), path, folder=loaded.file.folder, external=loaded.file.external)
        loss = run.references.loss(Session(path, provider=settings.provider, threads=0, purpose="verify")).value()
        (timed,) = measure.race(
            [loaded.file.path, path], loaded.feeds[0], provider=settings.provider, threads=1, seed=0, seconds=seconds
        )
        left = placed(path, loaded.feeds[0], path.parent, provider=settings.provider)
    faster = timed.ratio.low > max(1.0, timed.aa.value) and loss <= LOSS
    told = timed.to_dict()
    for side in ("before", "after"):
        told[side].pop("samples_ms", None)
    told.pop("control_ms", None)
    return {
        "status": "optimized" if faster else "unchanged", "ratio": timed.ratio.value if faster else 1.0,
        "loss": loss if faster else 0.0, "measured": {"loss": loss, **told}, "kinds": kinds,
        "additivity": one.additivity, "fallback": [p.to_dict() for p in left[:50]], **card(settings.provider),
    }  # fmt: skip
