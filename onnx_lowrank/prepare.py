"""From a model file to sites with shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import synthetic
from onnx_lowrank.branches import Opening, candidates
from onnx_lowrank.conditions import agreed_by_all
from onnx_lowrank.data import Source, open_source, split
from onnx_lowrank.errors import DataError, ModelError
from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.functions import inlined
from onnx_lowrank.fused import open_fused
from onnx_lowrank.graph import Graph
from onnx_lowrank.inputs import InputSpec
from onnx_lowrank.linalg import Metric
from onnx_lowrank.merging import Merged, Pair, merged, read
from onnx_lowrank.protos import BORDER
from onnx_lowrank.reached import left_out, reachable, same_shape
from onnx_lowrank.runtime import Feed, NodeRun, Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Keep, Site, Why
from onnx_lowrank.vocabulary import table_rows

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all; its cost may follow the name, `probe: …`."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that runs on its data: sites with shapes, everything else with a reason.

    `file` holds the model with the bodies of `opening` opened; what is built of it is to be closed again.
    `feeds` are the inputs of every timing, one for each set of shapes; `runs` are their profiled runs. `metrics` tell
    which errors of a site's output matter to the sites that read it, where only sites do. `merged` are neighbours
    that became one node: `file.model` has the products.
    """

    file: ModelFile
    graph: Graph
    source: Source
    calibration: Source
    held_out: Source
    shared: bool
    feeds: tuple[Feed, ...]
    runs: tuple[Mapping[int, NodeRun], ...]
    sites: tuple[Site, ...]
    kept: tuple[Keep, ...]
    opening: Opening
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    merged: tuple[Merged, ...] = ()

    def input_bytes(self, site: Site) -> int:
        """Size of what a site reads for one sample, at all of its places together."""
        return sum(_largest(self.runs[0][place.nodes[0]].input_shapes) for place in site.places)

    def output_bytes(self, site: Site) -> int:
        """The same of what it makes."""
        return sum(_largest(self.runs[0][place.nodes[0]].output_shapes) for place in site.places)


def _largest(shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of the largest of some float tensors."""
    return 4 * max(math.prod(shape) for shape in shapes)


def load(path: Path, data: Any, settings: Settings, progress: Progress, merges: Sequence[Pair] | None = None) -> Loaded:
    """Read the model, open the data, run one sample, multiply neighbours, find the sites.

    Args:
        merges: the neighbours that a plan has multiplied; None finds them.

    Raises:
        ModelError, DataError, SettingsError, RuntimeMissing: one line each.
    """
    progress("read", 0, 1)
    file = read_model(path)
    if settings.inline_functions:
        file = inlined(file)
    source, feeds = _tried(file, data, settings)
    calibration, held_out, shared = split(source)
    opening = _opening(file, source, feeds, settings)
    file = open_fused(dataclasses.replace(file, model=opening.flat))
    known, done = merged(
        read(file, feeds), feeds, settings, lambda site, runs: left_out(site, runs, settings) is None, merges
    )
    file, graph, runs, found = known.file, known.graph, known.runs, known.found
    sites, dropped = reachable(found.sites, runs, settings)
    inside = opening.inside()
    sites = tuple(
        dataclasses.replace(
            site, joins=site.joins if same_shape(graph, runs[0], site) else None, branch=inside.get(site.y, "")
        )
        for site in sites
    )
    kept = [keep for keep in found.kept if not (keep.node.startswith(BORDER) or opening.again(keep.node))]
    kept += [Keep(node.name, node.op_type, Why.NOT_EXECUTED) for node in opening.untaken()]
    progress("read", 1, 1)
    return Loaded(
        file, graph, source, calibration, held_out, shared, feeds, runs, sites, (*kept, *dropped), opening, merged=done
    )


def _opening(file: ModelFile, source: Source, feeds: Sequence[Feed], settings: Settings) -> Opening:
    """Branches that all samples take, and loops that they run equally often, opened.

    None where a precision is made, whose converters rewrite every node.
    """
    if settings.precision not in (None, "fp32") or not candidates(file.model):
        return Opening.none(file.model)
    return agreed_by_all(file.model, file.folder, (source, feeds), settings.provider)


def _tried(file: ModelFile, data: Any, settings: Settings) -> tuple[Source, tuple[Feed, ...]]:
    """What `open_inputs` gives, once the first sample has run; the session is gone before others are opened."""
    session = Session(file.path, provider=settings.provider, threads=settings.threads)
    source, feeds = open_inputs(session, data, settings, file)
    _try(session, source)
    return source, feeds


def _try(session: Session, source: Source) -> None:
    """Run the first sample.

    Raises:
        ModelError: the model fails on it.
    """
    try:
        session.run(next(iter(source)))
    except ModelError as fault:
        if not source.synthetic:
            raise
        way = "real --data" if "out of data bounds" in str(fault) else "--shape NAME:1,3,224,224 or real --data"
        raise ModelError(f"{fault}; the inputs were made up: give {way}") from None


def open_inputs(
    session: Session, data: Any, settings: Settings, file: ModelFile | None
) -> tuple[Source, tuple[Feed, ...]]:
    """The samples, and the inputs of every timing.

    Args:
        file: what the session runs; its tables tell which ids there are.

    Raises:
        DataError, SettingsError: no samples, or data or shapes that do not fit the model.
    """
    rows = {} if file is None else table_rows(file.model)
    specs = [InputSpec(name, dtype, shape, rows.get(name, 0)) for name, dtype, shape in session.inputs()]
    shapes = settings.shapes[0] if settings.shapes and data is None else None
    source = open_source(specs, data, limit=settings.samples, seed=settings.seed, shapes=shapes)
    first = next(iter(source), None)
    if first is None:
        raise DataError(f"{source.description}: no samples; give at least one")
    return source, _timing_feeds(specs, settings, first)


def _timing_feeds(specs: Sequence[InputSpec], settings: Settings, first: Feed) -> tuple[Feed, ...]:
    """The first sample, or synthetic ones of each set of shapes that is asked for."""
    if not settings.shapes:
        return (first,)
    sizes = [synthetic.resolve_shapes(specs, shapes) for shapes in settings.shapes]
    return tuple(next(synthetic.samples(specs, size, settings.seed)) for size in sizes)
