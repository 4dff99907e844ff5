"""Check one random model: rewritten at full rank and at a low rank, its outputs held against ONNX Runtime.

The oracle of full rank is the original; that of a low rank is the original with the dense product of the two factors.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fuzz_models
import numpy as np
import numpy.typing as npt
import onnx

import onnx_lowrank
from onnx_lowrank.conditions import agreed_by_all
from onnx_lowrank.constants import CONSTANT_OPS
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.files import read_model, write_model
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.measure import parameters
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.protos import reads, subgraphs
from onnx_lowrank.rewrite import patch_of
from onnx_lowrank.runtime import Session, profile
from onnx_lowrank.sites import Site

Array = npt.NDArray[Any]
Made = tuple[tuple[Array, ...], Array]
TOLERANCE = {"float32": 2e-4, "float16": 6e-2, "float64": 1e-6}
"""Of the largest output; a wrong rewrite is off by about as much as the outputs themselves."""


class WrongError(AssertionError):
    """What must never happen, in one line."""


def check(seed: int, *, pipeline: bool) -> str:
    """What became of the model of a seed: `checked`, `no site`, or why the runtime does not run it.

    Args:
        pipeline: send it through `optimize` too.

    Raises:
        WrongError: an output that is off, a partial file, a lost node.
        Exception: anything else is a bug too.
    """
    model, feed = fuzz_models.make(seed)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fuzz ü ") as scratch:
        path = Path(scratch) / "random modèl.onnx"
        external = rng.random() < 0.3
        write_model(model, path, folder=path.parent, external=external)
        file = read_model(path)
        if Graph(file.model, file.folder).commit().SerializeToString() != file.model.SerializeToString():
            raise WrongError("a model without patches is not the same bytes")
        if pipeline:
            _optimized(path, feed, rng)
        outcome = _rewritten(file.model, path.parent, feed, rng)
        if outcome != "refused by the runtime":
            _bodies(file.model, path.parent, feed, rng)
        if outcome == "checked" and external:
            _saved(file.model, path.parent, feed)
        return outcome


def _rewritten(model: onnx.ModelProto, folder: Path, feed: Mapping[str, Array], rng: random.Random) -> str:
    graph = Graph(model, folder)
    sites = list(survey(graph).sites)
    _every_node_is_named(graph, len(model.graph.node))
    why, runs = "", {}
    try:
        runs = profile(model, feed, folder=folder)
    except LowRankError as fault:
        why = str(fault)[:100]
    sites = [s.seen((_x_shape(s, runs),)) if runs else s for s in sites if not runs or _one_fragment(s, runs)]
    if not sites:
        return "refused by the runtime" if why else "no site"
    full = [_factored(site, rng, full=True) for site in sites]
    low = [_factored(site, rng, full=False) for site in sites]
    exact = _commit(model, folder, [patch for patch, _ in full])
    thin = _commit(model, folder, [patch for patch, _ in low])
    dense = _commit(model, folder, [patch for _, patch in low])
    _untouched(model, exact, sites)
    grown = sum(p.size for patch, _ in low for p in patch.fragment.constants.values())
    dense_size = sum(s.weight.size + s.geometry.outputs for s in sites)
    if parameters(thin) > parameters(model) + max(grown - dense_size, 0) + sum(s.geometry.outputs for s in sites):
        raise WrongError(f"{parameters(thin)} parameters, {parameters(model)} before: a weight was left behind")
    if why:
        return "refused by the runtime"
    _same(model, exact, folder, feed, "full rank")
    _same(dense, thin, folder, feed, "low rank")
    return "checked"


def _bodies(model: onnx.ModelProto, folder: Path, feed: Mapping[str, Array], rng: random.Random) -> None:
    """Branches that are taken and loops, opened: closed to the same bytes, and rewritten inside at full rank."""
    opening = agreed_by_all(model, folder, ([feed],), "cpu")
    if not opening.taken:
        return
    if opening.closed(opening.flat).SerializeToString() != model.SerializeToString():
        raise WrongError("opened and closed, a model is not the same bytes")
    _same(model, opening.flat, folder, feed, "opened")
    runs = profile(opening.flat, feed, folder=folder)
    found = [site for site in survey(Graph(opening.flat, folder)).sites if _one_fragment(site, runs)]
    sites = [site.seen((_x_shape(site, runs),)) for site in found]
    patches = [_factored(site, rng, full=True)[0] for site in sites]
    _same(model, opening.closed(_commit(opening.flat, folder, patches)), folder, feed, "full rank in bodies")


def _one_fragment(site: Site, runs: Mapping[int, Any]) -> bool:
    """Whether every place of a site was executed, on tensors of as many dimensions."""
    places = [place.nodes[0] for place in site.places]
    return all(p in runs for p in places) and len({len(runs[p].output_shapes[0]) for p in places}) == 1


def _x_shape(site: Site, runs: Mapping[int, Any]) -> tuple[int, ...]:
    return tuple(runs[site.nodes[0]].input_shapes[1 if site.geometry.side == "left" else 0])


def _every_node_is_named(graph: Graph, count: int) -> None:
    found = survey(graph)
    inner = [n for node in graph.protos for body in subgraphs(node) for n in body.node]
    functions = sum(len(f.node) for f in graph.model.functions)
    if sum(len(s.places) for s in found.sites) + len(found.kept) < count + len(inner) + functions:
        raise WrongError(f"{len(found.sites)} sites and {len(found.kept)} others of {count} nodes")


def _factored(site: Site, rng: random.Random, *, full: bool) -> tuple[Patch, Patch]:
    """A patch of a random kind, and the one of the dense product of its factors."""
    g = site.geometry
    kinds = [kind for kind in KINDS if kind.name in MAKERS and kind.applies(g)]
    rng.shuffle(kinds)
    for kind in kinds:
        rank = kind.full(g) if full else rng.randint(1, max(kind.max_rank(g), 1))
        factors, product = MAKERS[kind.name](site, rank, rng, full)
        if kind.name != "pivot" or (rank < g.outputs and kind.usable(g, factors[0])):
            break
    made, dense = kind.build(g, *factors, site.bias_vector), dense_fragment(g, product, site.bias_vector)
    return patch_of(site, made, kind.name), patch_of(site, dense, kind.name)


def _low_rank(site: Site, rank: int, rng: random.Random, full: bool) -> Made:
    """Of each group for itself, as the convolution or batch of matrices that they are."""
    del rng, full
    lefts, rights = [], []
    for weight in np.split(site.weight.astype(np.float64), site.geometry.groups):
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        lefts.append(u[:, :rank])
        rights.append(s[:rank, None] * vt[:rank])
    product = np.concatenate([left @ right for left, right in zip(lefts, rights, strict=True)])
    return (np.concatenate(lefts), np.concatenate(rights)), product


def _columns(site: Site, rank: int) -> tuple[Array, Array]:
    """Vertical filters r×C×kh and horizontal ones N×r×kw, exact at full rank."""
    g = site.geometry
    (kh, kw), c, n = g.kernel, g.channels, g.outputs
    across = site.weight.astype(np.float64).reshape(n, c, kh, kw).transpose(1, 2, 0, 3).reshape(c * kh, n * kw)
    u, s, vt = np.linalg.svd(across, full_matrices=False)
    first = (u[:, :rank] * s[:rank]).T.reshape(rank, c, kh)
    return first, vt[:rank].reshape(rank, n, kw).transpose(1, 0, 2)


def _spatial(site: Site, rank: int, rng: random.Random, full: bool) -> Made:
    del rng, full
    first, second = _columns(site, rank)
    product = np.einsum("rci,nrj->ncij", first, second)
    return (first.reshape(rank, -1), second.reshape(len(second), -1)), product.reshape(len(second), -1)


def _asym3d(site: Site, rank: int, rng: random.Random, full: bool) -> Made:
    g = site.geometry
    most = min(g.channels * g.kernel[0], g.outputs * g.kernel[1])
    inner = most if full else rng.randint(1, most)
    first, second = _columns(site, inner)
    last = _mixing(g.outputs, rank, rng, full)
    core = np.einsum("nr,nsj->rsj", last, second)
    product = np.einsum("sci,rsj,nr->ncij", first, core, last)
    return (first.reshape(inner, -1), core.reshape(rank, -1), last), product.reshape(g.outputs, -1)


def _tucker(site: Site, rank: int, rng: random.Random, full: bool) -> Made:
    g = site.geometry
    inner = g.channels if full else rng.randint(1, g.channels)
    first, last = _mixing(g.channels, inner, rng, full).T, _mixing(g.outputs, rank, rng, full)
    weight = site.weight.astype(np.float64).reshape(g.outputs, g.channels, -1)
    core = np.einsum("nct,sc,nr->rst", weight, first, last)
    product = np.einsum("sc,rst,nr->nct", first, core, last)
    return (first, core.reshape(rank, -1), last), product.reshape(g.outputs, -1)


def _mixing(size: int, rank: int, rng: random.Random, full: bool) -> Array:
    """Orthonormal columns, size×rank; the identity at full rank."""
    if full:
        return np.eye(size)
    return np.linalg.qr(np.random.default_rng(rng.getrandbits(32)).standard_normal((size, size)))[0][:, :rank]


MAKERS = {
    **dict.fromkeys(("svd", "conv_svd", "pivot"), _low_rank), "spatial": _spatial, "asym3d": _asym3d, "tucker": _tucker,
}  # fmt: skip
"""Factors of a kind, and the dense weight that they stand for."""


def _commit(model: onnx.ModelProto, folder: Path, patches: list[Patch]) -> onnx.ModelProto:
    graph = Graph(model, folder)
    for patch in patches:
        graph.apply(patch)
    return graph.commit()


def _untouched(before: onnx.ModelProto, after: onnx.ModelProto, sites: list[Site]) -> None:
    """Every node that no site stands for is there in its order, byte for byte; so is all beside the graph's lists."""
    replaced = {position for site in sites for place in site.places for position in place.nodes}
    read = reads(after.graph, after.graph.node)
    old = [n for i, n in enumerate(before.graph.node) if i not in replaced]
    old = [n for n in old if any(read[o] for o in n.output) or n.op_type not in CONSTANT_OPS]
    new = [
        n.SerializeToString()
        for n in after.graph.node
        if not any(p.key == "onnx_lowrank.pass" for p in n.metadata_props)
    ]
    if set(new) - {n.SerializeToString() for n in before.graph.node}:
        raise WrongError("a node that no patch touches is changed")
    if [n.SerializeToString() for n in old if n.SerializeToString() in set(new)] != new:
        raise WrongError("nodes changed their order")
    if len(old) > len(new):
        raise WrongError(f"{len(old) - len(new)} nodes are lost")
    for field in ("metadata_props", "opset_import", "functions", "ir_version", "producer_name", "doc_string"):
        if getattr(before, field) != getattr(after, field):
            raise WrongError(f"{field} changed")
    for field in ("output", "sparse_initializer", "name", "doc_string"):
        if getattr(before.graph, field) != getattr(after.graph, field):
            raise WrongError(f"the graph's {field} changed")


def _same(before: onnx.ModelProto, after: onnx.ModelProto, folder: Path, feed: Mapping[str, Array], what: str) -> None:
    old, new = (Session(m, folder=folder, optimisations="disable_all") for m in (before, after))
    if old.output_names != new.output_names:
        raise WrongError(f"{what}: outputs {new.output_names}, {old.output_names} before")
    for name, y, z in zip(old.output_names, old.run(feed), new.run(feed), strict=True):
        if y.dtype != z.dtype or y.shape != z.shape:
            raise WrongError(f"{what}: output {name} is {z.dtype}{z.shape}, {y.dtype}{y.shape} before")
        if y.dtype == object:
            off = float(not np.array_equal(y, z))
        else:
            wide = [a.astype(np.float64) for a in (y, z)]
            off = float(np.abs(wide[0] - wide[1]).max(initial=0.0) / max(np.abs(wide[0]).max(initial=0.0), 1.0))
        if not off <= TOLERANCE.get(y.dtype.name, 0.0):
            raise WrongError(f"{what}: output {name} is off by {off:.2g} of {y.dtype}")


def _saved(model: onnx.ModelProto, folder: Path, feed: Mapping[str, Array]) -> None:
    """Written anew, once with its data inside and once beside, it computes the same."""
    out = folder / "again.onnx"
    for external in (False, True):
        write_model(model, out, folder=folder, external=external)
        _same(model, read_model(out).model, folder, feed, "saved")


def _optimized(path: Path, feed: Mapping[str, Array], rng: random.Random) -> None:
    """The whole journey: OUT is complete, or there is none and one line says why."""
    out = path.with_name("out.onnx")
    before = {p.name for p in path.parent.iterdir()}
    samples = [{k: _varied(v, np.random.default_rng(i)) for k, v in feed.items()} for i in range(6)]
    data = samples if rng.random() < 0.7 else None
    try:
        with contextlib.chdir(path.parent):
            report = onnx_lowrank.optimize(path, out, data=data, cache=path.parent / "cache", max_loss=0.5)
    except LowRankError as fault:
        if "\n" in str(fault) or out.exists():
            raise WrongError(f"refused, but not in one line or with a file: {fault}") from None
    else:
        Session(out)
        if report.verdict.status == "unchanged" and out.read_bytes() != path.read_bytes():
            raise WrongError("unchanged, but other bytes")
        out.unlink()
    shutil.rmtree(path.parent / "cache", ignore_errors=True)
    left = {p.name for p in path.parent.iterdir()} - before
    if any(not (name.startswith("out.onnx.") and name.endswith(".data")) for name in left):
        raise WrongError(f"left behind: {left}")


def _varied(value: Array, rng: np.random.Generator) -> Array:
    noisy = value + rng.standard_normal(value.shape).astype(value.dtype) if value.dtype.kind == "f" else value
    return np.asarray(noisy, value.dtype)
