"""What the sites cost inside the whole model: the runtime's own profile, node by node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.graph import Graph
from onnx_lowrank.plan import Decision
from onnx_lowrank.precision import Lowering
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.rewrite import dense_patch
from onnx_lowrank.runtime import node_times
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site

Factors = Mapping[str, tuple[float, float]]
"""By node: in-situ over predicted time of the dense weight, and of what the plan put in its place."""

_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Add", "Sum")


def dense_shares(loaded: Loaded, settings: Settings, lowering: Lowering | None = None) -> dict[str, float]:
    """What share of the original's time every site's own weight takes, in the precision that will be deployed."""
    graph = Graph(loaded.file.model, loaded.file.folder)
    for site in loaded.sites:
        graph.apply(dense_patch(site, "profile"))
    built = graph.commit()
    return shares(built if lowering is None else lowering.model(built), loaded, settings)


def shares(model: onnx.ModelProto, loaded: Loaded, settings: Settings) -> dict[str, float]:
    """What share of a built model's time every site takes, by the runtime's profile.

    A profile has the least of a few runs, at its own moment; a race has the median of many. On a machine that is
    shared the two have no common measure, shares have.
    """
    times: dict[str, float] = {}
    for feed in loaded.feeds:
        at = node_times(model, feed, loaded.file.folder, provider=settings.provider, threads=settings.threads)
        times = {node: times.get(node, 0.0) + at.get(node, 0.0) for node in {**times, **at}}
    total = sum(times.values()) or 1.0  # a profile counts whole microseconds: all may be 0
    return {node: ms / total for node, ms in by_site(times, loaded.sites, tails(loaded)).items()}


def tails(loaded: Loaded) -> dict[str, str]:
    """Sites by the tensors that may leave them when the runtime fuses what follows: activation, residual Add."""
    graph, found = loaded.graph, {}
    for place, name in ((place, site.name) for site in loaded.sites for place in site.places):
        tensor = place.y
        for _ in range(3):
            found[tensor] = name
            readers = graph.readers(tensor)
            if len(readers) != 1 or graph.protos[readers[0]].op_type not in _FUSED:
                break
            tensor = graph.protos[readers[0]].output[0]
    return found


def by_site(times: Mapping[str, float], sites: Sequence[Site], ends: Mapping[str, str]) -> dict[str, float]:
    """Sum of the times of a site's nodes, in all its places.

    The runtime keeps names when it fuses, so that they start with `SITE/`; only convolutions in its blocked layout
    are called after the tensor that leaves them (`TENSOR_nchwc`).

    Args:
        ends: sites by the tensors that may leave them.
    """
    found: dict[str, float] = {}
    names = {place.name: site.name for site in sites for place in site.places}
    for node, ms in times.items():
        owner = ends.get(node.removesuffix("_nchwc")) if node.endswith("_nchwc") else None
        owner = owner or next((names[name] for name in _prefixes(node) if name in names), None)
        if owner is not None:
            found[owner] = found.get(owner, 0.0) + ms
    return found


def _prefixes(name: str) -> Iterator[str]:
    """What stands before each `/`, the longest first."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def pace(decisions: Sequence[Decision], dense: Mapping[str, float]) -> float:
    """In-situ over predicted time of all dense weights that both know: the machine is slower or faster by now.

    Args:
        dense: milliseconds inside the original.
    """
    known = [(dense[d.node], d.ms_before) for d in decisions if d.ms_before and d.node in dense]
    return sum(now for now, _ in known) / sum(then for _, then in known) if known else 1.0


def factors(
    decisions: Sequence[Decision], dense: Mapping[str, float], rewritten: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """In-situ over predicted times of the rewritten sites; a site that the profile does not show is left out."""
    found = {}
    for d in decisions:
        if d.kind and d.ms_before and d.ms_after and d.node in dense and d.node in rewritten:
            found[d.node] = (dense[d.node] / d.ms_before, rewritten[d.node] / d.ms_after)
    return found


def retimed(decisions: Sequence[Decision], known: Factors) -> tuple[Decision, ...]:
    """The decisions with their milliseconds as the profile says."""

    def one(decision: Decision) -> Decision:
        if decision.node not in known or decision.ms_before is None or decision.ms_after is None:
            return decision
        before, after = known[decision.node]
        return dataclasses.replace(decision, ms_before=decision.ms_before * before, ms_after=decision.ms_after * after)

    return tuple(one(decision) for decision in decisions)


def corrected(choices: Sequence[Choices], known: Factors, lost: Mapping[str, float] | None = None) -> list[Choices]:
    """The choices with their milliseconds as the profile says; what is no longer faster is no candidate.

    Args:
        lost: milliseconds that any rewrite of a site costs elsewhere, by node.
    """
    extra = lost or {}
    return [_corrected(c, known.get(c.dense.node), extra.get(c.dense.node, 0.0)) for c in choices]


def _corrected(choice: Choices, factor: tuple[float, float] | None, extra: float) -> Choices:
    if choice.dense.ms_before is None or (factor is None and not extra):
        return choice
    factor = factor or (1.0, 1.0)
    dense = dataclasses.replace(choice.dense, ms_before=choice.dense.ms_before * factor[0])

    def scaled(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        return tuple(dataclasses.replace(c, ms=c.ms * factor[1] + extra) for c in candidates)

    faster = tuple(c for c in scaled(choice.candidates) if c.ms < (dense.ms_before or 0.0))
    return dataclasses.replace(choice, dense=dense, candidates=faster, timed=scaled(choice.timed))
