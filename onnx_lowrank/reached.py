"""Which sites are asked for, and were reached by the runs that show their shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from onnx_lowrank.graph import Graph
from onnx_lowrank.merging import Runs, asked_for, seen
from onnx_lowrank.runtime import NodeRun
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Keep, Site, Why


def reachable(sites: tuple[Site, ...], runs: Runs, settings: Settings) -> tuple[tuple[Site, ...], tuple[Keep, ...]]:
    """The sites that are asked for and were executed, with their input shapes."""
    kept, left = [], []
    for site in sites:
        why = left_out(site, runs, settings)
        if why is not None:
            left.append(Keep(site.name, site.geometry.op, why))
            continue
        kept.append(seen(site, runs))
    return tuple(kept), tuple(left)


def same_shape(graph: Graph, run: Mapping[int, NodeRun], site: Site) -> bool:
    """Whether the residual sum that a site's output enters has the shape of that output: nothing was broadcast."""
    position = graph.producer(site.joins[0]) if site.joins else None
    return position is None or run[position].output_shapes == run[site.nodes[-1]].output_shapes


def left_out(site: Site, runs: Runs, settings: Settings) -> Why | None:
    """Why a site may not be touched: it is not asked for, or a run has not shown all its places, or not alike."""

    if not asked_for([place.name for place in site.places], settings):
        return Why.EXCLUDED
    dimensions = set()
    for place, found in itertools.product(site.places, runs):
        run = found.get(place.nodes[0])
        if run is None or any(math.prod(shape) == 0 for shape in run.output_shapes):
            return Why.NOT_EXECUTED
        dimensions.add(len(run.output_shapes[0]))
    # One fragment has to do for all places, and a Concat in it counts its axes from the first.
    return Why.SHARED if site.twins and len(dimensions) > 1 else None
