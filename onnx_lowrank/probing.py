"""Every candidate's estimated loss: how many probes there are, what they cost, and the curves through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lowrank import measure
from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.probe import Probes
from onnx_lowrank.run import Run
from onnx_lowrank.sensitivity import Response, floored, responses, spare_probes

Curve = tuple[str, bool]
"""Whose error it is: that of a site at a rank, or (True) that of one that reads a narrower hidden layer."""

_MACS = 2e12  # multiply-adds of two probes a site, less than a minute of two cores; twice that where samples are few
_SAMPLES = (3, 16)  # of a probe, least and most


def with_losses(run: Run, choices: list[Choices]) -> list[Choices]:
    """Estimate every candidate's loss from probes of its site."""
    asked = [c for c in choices if c.candidates or (c.timed and run.settings.policy != "knapsack")]
    if not asked:
        return choices
    macs = max(measure.multiply_adds(dict(run.loaded.runs[0])), 1)
    samples = int(np.clip(_MACS / (macs * 2 * len(asked)), *_SAMPLES))
    names = {c.dense.node for c in asked}
    probed = Probes(run.loaded, [s for s in run.loaded.sites if s.name in names], run.fits, run.settings, samples)
    curves = _curves(run, asked)
    spare = spare_probes(len(asked), len(curves), int(2 * _MACS / (macs * probed.samples)))
    cost = cost_of(len(curves) + spare, probed.samples, probed.seconds)

    def loss_of(curve: Curve, rank: int) -> float:
        node, narrow = curve
        return probed.narrow_loss(node, rank) if narrow else probed.loss(node, rank)

    found = responses(curves, loss_of, lambda done, total: run.clock("probe", done, total, cost), spare=spare)
    run.probes = {
        "sites": len(asked),
        "checked": len({node for (node, _), r in found.items() if r.checked}),
        "runs": probed.samples * sum(len(r.points) for r in found.values()),
        "samples": probed.samples,
        "not_linear": sorted({node for (node, _), r in found.items() if not r.linear}),
    }
    kinds = ({curve: r for curve, r in found.items() if curve[1] is narrow} for narrow in (False, True))
    known = {curve: r for alike in kinds for curve, r in floored(alike).items()}
    return [
        dataclasses.replace(c, candidates=_weighted(c, c.candidates, known), timed=_weighted(c, c.timed, known))
        for c in choices
    ]


def cost_of(probes: int, samples: int, seconds: float) -> str:
    """What probing will take, in words.

    Args:
        probes: how many there are at most.
        samples: of each.
        seconds: of one sample.
    """
    runs = probes * samples
    expected = runs * seconds
    time = f"{max(expected, 1):.0f} s" if expected < 60 else f"{expected / 60:.0f} min"
    return f"up to {runs} runs on {samples} samples, about {time}"


def _curves(run: Run, asked: Sequence[Choices]) -> list[tuple[Curve, dict[int, float]]]:
    """Local error by rank, and by width, of all that has a probe to make: the most multiply-adds first."""
    baseline = run.settings.policy != "knapsack"
    found: list[tuple[Curve, dict[int, float]]] = []
    for c in sorted(asked, key=lambda c: -c.macs):
        node = c.dense.node
        if c.ranked or (c.timed and baseline):
            found.append(((node, False), _errors(run, c)))
        if run.fits[node].narrow is not None:
            found.append(((node, True), {k.rank: k.error for k in c.candidates if k.partner}))
    return [(curve, errors) for curve, errors in found if any(error > 0 for error in errors.values())]


def _errors(run: Run, choice: Choices) -> dict[int, float]:
    """Local error by rank of the best low-rank map, over the range of errors that the site's candidates have."""
    spectrum = run.fits[choice.dense.node].factorization
    limit = max(k.error for k in choice.ranked or choice.timed)
    ranks = range(1, min(choice.dense.shape))
    errors = {rank: spectrum.relative(rank) for rank in ranks}
    most = max(limit, min(errors.values(), default=0.0))
    return {rank: error for rank, error in errors.items() if error <= most}


def _weighted(
    choice: Choices, candidates: tuple[Candidate, ...], known: Mapping[Curve, Response]
) -> tuple[Candidate, ...]:
    estimated = [(c, known.get((choice.dense.node, c.partner is not None))) for c in candidates]
    return tuple(c if r is None else dataclasses.replace(c, loss=r.loss(c.error)) for c, r in estimated)
