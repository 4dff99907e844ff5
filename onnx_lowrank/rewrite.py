"""Turn a plan into patches and patches into a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Sequence

import numpy as np
import onnx

from onnx_lowrank.calibration import Fit, Fits, factors, narrow_fit, shared_fit
from onnx_lowrank.chains import Chain, chain_after
from onnx_lowrank.errors import PassError, SettingsError
from onnx_lowrank.families import Apart, Family, common, family_of, sets
from onnx_lowrank.files import ModelFile
from onnx_lowrank.fragment import Fragment, size_text
from onnx_lowrank.fused import close_fused
from onnx_lowrank.graph import Graph, Patch, Place
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.nystrom import NYSTROM, narrow_layer, narrow_positions
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.passes.shared import SHARED, Pivots, most_rank, shared_factor
from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Site


@dataclasses.dataclass
class Latest:
    """The latest patch of each site alone: between the plans of a search most sites stay what they were."""

    known: dict[str, tuple[Fit, tuple[str | None, int, int], Patch]] = dataclasses.field(default_factory=dict)

    def keep(self, names: Collection[str]) -> None:
        """Let go of the patches of all other sites."""
        for name in self.known.keys() - set(names):
            del self.known[name]

    def patch(self, site: Site, fit: Fit, decision: Decision) -> Patch:
        """The site's patch, made again where its fit, kind or size is another one."""
        known, rank, inner = self.known.get(site.name), decision.rank or 0, decision.inner
        if known is None or known[0] is not fit or known[1] != (decision.kind, rank, inner):
            kind = next(kind for kind in KINDS if kind.name == decision.kind)
            patch = patch_of(site, kind.build(site.geometry, *factors(site, fit, kind, rank, inner)), kind.name)
            known = self.known[site.name] = (fit, (kind.name, rank, inner), patch)
        return known[2]


def patches(
    graph: Graph, sites: Sequence[Site], fits: Fits, decisions: Sequence[Decision], latest: Latest | None = None
) -> Iterator[Patch]:
    """One patch for every decision that changes a site; sites that are decided together share one.

    Args:
        graph: before the first of them.
        latest: patches that may be taken as they are, of the same sites.
    """
    latest = latest or Latest()
    latest.keep([d.node for d in decisions if d.kind])
    by_name = {site.name: site for site in sites}
    yield from _narrow_patches(graph, sites, fits, [d for d in decisions if d.kind == NYSTROM])
    yield from _shared_patches(sites, fits, [d for d in decisions if d.kind == SHARED])
    for decision in decisions:
        if decision.kind in (None, NYSTROM, SHARED) or decision.rank is None:
            continue
        yield latest.patch(by_name[decision.node], fits[decision.node], decision)


def _narrow_patches(graph: Graph, sites: Sequence[Site], fits: Fits, decisions: Sequence[Decision]) -> Iterator[Patch]:
    by_name, at = {site.name: site for site in sites}, {site.nodes[0]: site for site in sites if not site.twins}
    widths = {d.node: d.rank or 0 for d in decisions}
    read = {name: fits[name].narrow for name in widths if name in fits}
    pairs = {name: narrow.producer for name, narrow in read.items() if narrow is not None}
    if sorted(widths) != sorted([*pairs, *pairs.values()]) or any(widths[a] != widths[b] for a, b in pairs.items()):
        raise PassError(f"{NYSTROM}: a site was to become narrower without the other one of its layer")
    for consumer, producer in pairs.items():
        chain = chain_after(graph, by_name[producer], at)
        if not isinstance(chain, Chain) or chain.consumer.name != consumer:
            raise PassError(f"{NYSTROM} at {consumer}: what it reads is not the channels of {producer} alone")
        yield narrow_patch(chain, fits, widths[consumer])


def narrow_patch(chain: Chain, fits: Fits, width: int) -> Patch:
    """Both sites of a layer and what lies between them, at a width."""
    first, second = chain.producer, chain.consumer
    full, bias = narrow_fit(second, fits[second.name], width)
    narrow = fits[second.name].narrow
    assert narrow is not None
    fragment = narrow_layer(
        chain,
        narrow.kept(width),
        first.weight.astype(np.float64),
        first.bias_vector,
        full[:, narrow.columns(width)],
        bias,
    )
    return Patch(second.name, narrow_positions(chain), first.x, second.y, fragment, NYSTROM, (first.name,))


def _shared_patches(sites: Sequence[Site], fits: Fits, decisions: Sequence[Decision]) -> Iterator[Patch]:
    """One for every family: which of its sites share a factor, one set at most, is told by the kind alone."""
    ranks = {d.node: d.rank or 0 for d in decisions}
    found: dict[Hashable, list[Site]] = {}
    for site in sites:
        if site.name in ranks:
            found.setdefault(common(site), []).append(site)
    for members in found.values():
        names = tuple(site.name for site in members)
        if names not in fits[names[0]].shared or len({ranks[name] for name in names}) > 1:
            raise PassError(f"{SHARED} at {names[0]}: the sites that were fitted together were not decided together")
        yield shared_patch(tuple(members), fits, ranks[names[0]])


def shared_patch(members: Family, fits: Fits, rank: int) -> Patch:
    """Sites on their common factor of a rank."""
    names, geometries = [site.name for site in members], [site.geometry for site in members]
    found = fits[names[0]].shared[tuple(names)]
    parts = [shared_fit(site, fits[site.name], found, rank) for site in members]
    pivots = Pivots.of([left for left, _ in parts])
    down = parts[pivots.owner][0][pivots.rows] @ found.right(rank)
    fragment = shared_factor(names, geometries, pivots, down, [bias for _, bias in parts])
    nodes = tuple(node for site in members for node in site.nodes)
    first, *others = members
    also, tensors = (tuple(getattr(site, name) for site in others) for name in ("name", "y"))
    return Patch(first.name, nodes, first.x, first.y, fragment, SHARED, also, tensors)


def patch_of(site: Site, fragment: Fragment, made_by: str) -> Patch:
    """A fragment in the place of a site and of its twins."""
    twins = tuple(Place(twin.name, twin.nodes, twin.x, twin.y) for twin in site.twins)
    return Patch(site.name, site.nodes, site.x, site.y, fragment, made_by, twins=twins)


def dense_patch(site: Site, made_by: str) -> Patch:
    """A site written as its own operator, so that its constants and nodes get names that are known."""
    fragment = dense_fragment(site.geometry, site.weight, site.bias_vector)
    return patch_of(site, fragment, made_by)


def rewritten(
    file: ModelFile,
    sites: Sequence[Site],
    fits: Fits,
    decisions: Sequence[Decision],
    latest: Latest | None = None,
    *,
    provenance: bool = True,
    closed: bool = True,
) -> onnx.ModelProto:
    """A new model with every decision carried out; the file's own ModelProto stays as it is.

    Args:
        latest: see `patches`.
        provenance: see `Graph`.
        closed: whether fused nodes that nothing touched are fused again.

    Raises:
        PassError: a patch that would break the graph.
    """
    graph = Graph(file.model, file.folder, provenance=provenance)
    for patch in patches(graph, sites, fits, decisions, latest):
        graph.apply(patch)
    return close_fused(graph.commit(), file.opened if closed else ())


def check_matches(decisions: Sequence[Decision], sites: Sequence[Site]) -> None:
    """Refuse a plan that was made for another graph.

    Raises:
        SettingsError: naming the first site that has another shape, or is missing and rewritten by the plan.
    """
    shapes = {site.name: (site.geometry.op, (site.geometry.outputs, site.geometry.inputs)) for site in sites}
    kinds = {kind.name: kind for kind in KINDS}
    geometry = {site.name: site.geometry for site in sites}
    twins = {site.name: tuple(twin.name for twin in site.twins) for site in sites}
    for decision in decisions:
        shape = shapes.get(decision.node)
        if shape is None and decision.kind is None:
            continue  # other samples may leave a branch out
        if shape is None:
            raise SettingsError(f"the plan rewrites node '{decision.node}', which is no site of this model")
        if shape != (decision.op, decision.shape):
            wanted = f"{decision.op} {decision.shape[0]}×{decision.shape[1]}"
            raise SettingsError(
                f"node '{decision.node}' is {shape[0]} {shape[1][0]}×{shape[1][1]} here, but {wanted} in the plan"
            )
        if decision.kind is None or decision.rank is None:
            continue
        if decision.tied != twins[decision.node]:
            tied, planned = (", ".join(names) or "none" for names in (twins[decision.node], decision.tied))
            raise SettingsError(
                f"the weight of node '{decision.node}' is shared with {tied} here, but with {planned} in the plan"
            )
        if decision.kind == NYSTROM:
            _check_pair(decision, decisions)
            continue
        if decision.kind == SHARED:
            _check_set(decision, decisions, sites)
            continue
        kind, here = kinds.get(decision.kind), geometry[decision.node]
        if kind is None or not kind.allows(here, decision.rank, decision.inner):
            size = size_text(decision.rank, decision.inner)
            raise SettingsError(f"node '{decision.node}' cannot become {decision.kind} at rank {size}")


def _check_pair(decision: Decision, decisions: Sequence[Decision]) -> None:
    """Both sites of a narrower layer name each other and have one width."""
    back = [d for d in decisions if d.node == decision.partner]
    if not back or (back[0].kind, back[0].rank, back[0].partner) != (NYSTROM, decision.rank, decision.node):
        raise SettingsError(
            f"node '{decision.node}' is {NYSTROM} {decision.rank} in the plan, but its partner "
            f"'{decision.partner}' is not; make the plan again"
        )


def _check_set(decision: Decision, decisions: Sequence[Decision], sites: Sequence[Site]) -> None:
    """Sites that share a factor name one another, have one rank, and read one tensor in the same way."""
    named = [d for d in decisions if d.node in decision.sharers]
    agreed = {(d.kind, d.rank, d.sharers) for d in named} == {(SHARED, decision.rank, decision.sharers)}
    if decision.node not in decision.sharers or len(named) != len(decision.sharers) or not agreed:
        raise SettingsError(
            f"node '{decision.node}' is {SHARED} {decision.rank} in the plan, but not all of its sharers are; "
            "make the plan again"
        )
    family = family_of(next(site for site in sites if site.name == decision.node), sites)
    known = sets(family) if not isinstance(family, Apart) and PIVOT.applies(family[0].geometry) else ()
    members = next((one for one in known if tuple(site.name for site in one) == decision.sharers), None)
    if members is None or not 0 < (decision.rank or 0) <= most_rank([site.geometry for site in members]):
        raise SettingsError(f"node '{decision.node}' cannot become {SHARED} {decision.rank} with its sharers here")
