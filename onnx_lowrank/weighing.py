"""Metrics of the sites' outputs: which errors matter to the sites and the attentions that read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from onnx_lowrank.attention import attentions
from onnx_lowrank.consumers import readers
from onnx_lowrank.heads import attention_metrics
from onnx_lowrank.importance import output_metrics
from onnx_lowrank.linalg import Metric
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site


def with_metrics(loaded: Loaded, settings: Settings, names: Collection[str] | None = None) -> Loaded:
    """The same, with the metrics of the sites' outputs (of the named ones only, where names are given).

    A site with twins has none: what reads one place need not be what reads another.
    """
    at = {place.nodes[0]: place for site in loaded.sites for place in site.places}
    alone = [site for site in loaded.sites if not site.twins]
    wanted = [site for site in alone if names is None or site.name in names]
    found = [(site, readers(loaded.graph, site, at)) for site in wanted]
    metrics = output_metrics(
        loaded.file.model,
        loaded.file.folder,
        [(site, read) for site, read in found if read],
        loaded.calibration,
        bytes_of=lambda site: 4 * math.prod(loaded.runs[0][site.nodes[-1]].output_shapes[0]),
        provider=settings.provider,
        seed=settings.seed,
    )
    return dataclasses.replace(loaded, metrics={**_head_metrics(loaded, settings, wanted), **metrics})


def _head_metrics(loaded: Loaded, settings: Settings, wanted: Sequence[Site]) -> dict[str, Metric]:
    """Metrics of queries, keys and values; what an attention is depends on all sites, not on the wanted ones."""
    names = {site.name for site in wanted}
    found = [
        one
        for one in attentions(loaded.graph, [site for site in loaded.sites if not site.twins])
        if any(site is not None and site.name in names for site in (one.query, one.key, one.value))
    ]
    shapes = loaded.runs[0]

    def bytes_of(tensor: str) -> int:
        position = loaded.graph.producer(tensor)
        run = None if position is None else shapes.get(position)
        return 4 * max((math.prod(shape) for shape in run.output_shapes), default=0) if run is not None else 0

    metrics = attention_metrics(
        loaded.file.model,
        loaded.file.folder,
        found,
        loaded.calibration,
        bytes_of=bytes_of,
        provider=settings.provider,
    )
    return {name: metric for name, metric in metrics.items() if name in names}
