"""Turn a plan into patches and patches into a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx

from onnx_lowrank.calibration import Fits, fitted
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import ModelFile
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Site


def patches(sites: Sequence[Site], fits: Fits, decisions: Sequence[Decision]) -> Iterator[Patch]:
    """One patch for every decision that changes a site."""
    by_name = {site.name: site for site in sites}
    kinds = {kind.name: kind for kind in KINDS}
    for decision in decisions:
        if decision.kind is None or decision.rank is None:
            continue
        site, fit, kind = by_name[decision.node], fits[decision.node], kinds[decision.kind]
        fragment = kind.build(site.geometry, *fitted(site, fit, decision.rank, separable=kind.separable))
        yield Patch(site.name, site.nodes, site.x, site.y, fragment, kind.name)


def dense_patch(site: Site, made_by: str) -> Patch:
    """A site written as its own operator, so that its constants and nodes get names that are known."""
    fragment = dense_fragment(site.geometry, site.weight.astype(np.float64), site.bias_vector)
    return Patch(site.name, site.nodes, site.x, site.y, fragment, made_by)


def rewritten(file: ModelFile, sites: Sequence[Site], fits: Fits, decisions: Sequence[Decision]) -> onnx.ModelProto:
    """A new model with every decision carried out; the file's own ModelProto stays as it is.

    Raises:
        PassError: a patch that would break the graph.
    """
    graph = Graph(file.model, file.folder)
    for patch in patches(sites, fits, decisions):
        graph.apply(patch)
    return graph.commit()


def check_matches(decisions: Sequence[Decision], sites: Sequence[Site]) -> None:
    """Refuse a plan that was made for another graph.

    Raises:
        SettingsError: naming the first site that is missing or has another shape.
    """
    shapes = {site.name: (site.geometry.op, (site.geometry.outputs, site.geometry.inputs)) for site in sites}
    kinds = {kind.name: kind for kind in KINDS}
    geometry = {site.name: site.geometry for site in sites}
    for decision in decisions:
        if decision.kind is None or decision.rank is None:
            continue
        shape = shapes.get(decision.node)
        if shape is None:
            raise SettingsError(f"the plan rewrites node '{decision.node}', which is no site of this model")
        if shape != (decision.op, decision.shape):
            wanted = f"{decision.op} {decision.shape[0]}×{decision.shape[1]}"
            raise SettingsError(
                f"node '{decision.node}' is {shape[0]} {shape[1][0]}×{shape[1][1]} here, but {wanted} in the plan"
            )
        kind, here = kinds.get(decision.kind), geometry[decision.node]
        if kind is None or not kind.applies(here) or decision.rank > kind.max_rank(here):
            raise SettingsError(f"node '{decision.node}' cannot become {decision.kind} at rank {decision.rank}")
