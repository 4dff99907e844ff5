"""The stages of a run that `--resume` keeps: fits, choices with their probes, and the plan with its repaired fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from onnx_lowrank.allocate import Choices
from onnx_lowrank.plan import Plan
from onnx_lowrank.run import Run


def chosen(run: Run, choose: Callable[[Run], list[Choices]]) -> list[Choices]:
    """Every site's candidates; probes come along."""

    def made() -> tuple[Any, ...]:
        return choose(run), run.probes

    choices, run.probes = run.stages.recall("choices", made)
    return list(choices)


def planned(run: Run, data: tuple[str, ...], decide: Callable[[Sequence[Choices]], Plan],
            choose: Callable[[Run], list[Choices]]) -> Plan:  # fmt: skip
    """The plan; what deciding leaves in the run (repaired fits, figures, warnings) comes along."""
    before = run.fits

    def made() -> dict[str, Any]:
        plan = decide(chosen(run, choose))
        fits = {name: fit for name, fit in run.fits.items() if fit is not before[name]}
        notes = {name: getattr(run, name) for name in ("frontier", "probes", "additivity", "warnings")}
        return {"plan": plan, "fits": fits, **notes}

    found = run.stages.recall("plan", made)
    run.fits = {**before, **found["fits"]}
    for name in ("frontier", "probes", "additivity", "warnings"):
        setattr(run, name, found[name])
    plan: Plan = found["plan"]
    return dataclasses.replace(plan, data=data)
