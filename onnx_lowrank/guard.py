"""The fusion guard: what a plan makes the runtime no longer fuse, at which sites, and what that costs.

A fragment is timed alone, with the activation that follows. What lies further away (an attention, a scaled product, a
norm with its sum) is fused or not by the whole graph; a rewrite that takes a fusion apart is judged by the profile of
the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from onnx_lowrank import profiles, wholes
from onnx_lowrank.errors import ModelError
from onnx_lowrank.graph import Graph
from onnx_lowrank.plan import Decision
from onnx_lowrank.profiles import Profile
from onnx_lowrank.run import Run
from onnx_lowrank.sites import Site

_REACH = 2  # nodes between a site and a fused node that its rewrite can take apart


@dataclasses.dataclass(frozen=True)
class Losses:
    """Fusions that are gone, as (operator, node of the original), and milliseconds that this adds, by site."""

    fusions: tuple[tuple[str, str], ...] = ()
    ms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """As a row of a table of times, which holds numbers by label: the fusions' places in their order, and times."""
        places = {f"fusion {op} {node}": float(place) for place, (op, node) in enumerate(self.fusions)}
        return places | {f"at {node}": ms for node, ms in self.ms.items()}

    @classmethod
    def read(cls, row: Mapping[str, float]) -> Losses:
        """Out of such a row."""
        parts = [(*label.partition(" ")[::2], number) for label, number in row.items()]
        fusions = sorted((place, *name.partition(" ")[::2]) for word, name, place in parts if word == "fusion")
        return cls(tuple((op, node) for _, op, node in fusions), {name: ms for word, name, ms in parts if word == "at"})


def losses(run: Run, decisions: Sequence[Decision]) -> Losses:
    """What a plan loses, kept in the table; nothing where another precision fuses otherwise, or no profile is had."""
    if run.lowering is not None:
        return Losses()
    try:
        return Losses.read(
            run.table.recall(f"unfused {wholes.digest(run, decisions)}", lambda: _profiled(run, decisions).row())
        )
    except ModelError:
        return Losses()


def _profiled(run: Run, decisions: Sequence[Decision]) -> Losses:
    settings, feed, folder = run.settings, run.loaded.feeds[0], run.loaded.file.folder
    before, after = (
        profiles.profile_model(run.build(some), feed, folder, provider=settings.provider, threads=settings.threads)
        for some in ((), decisions)
    )
    chosen = {d.node for d in decisions if d.kind}
    return attributed(run.loaded.graph, [site for site in run.loaded.sites if site.name in chosen], before, after)


def attributed(graph: Graph, rewritten: Sequence[Site], before: Profile, after: Profile) -> Losses:
    """Fusions that are gone, and the time of what runs in their place shared among the rewritten sites next to them.

    Args:
        graph: of the original.
        rewritten: sites.
    """
    gone = tuple((row["op"], node) for row in profiles.fusions(before, after) for node in row["lost_at"])
    near = {site.name: _around(graph, site) for site in rewritten}
    blamed = [name for name, around in near.items() if any(node in around for _, node in gone)]
    if not blamed:
        return Losses(gone)
    positions = (position for site in rewritten for place in site.places for position in place.nodes)
    own = {label for position in positions for label in _labels(graph, position)} | set(near)
    old, new = before.by_owner(), after.by_owner()
    bare = {name for name in new if name in before.own and name not in old} | {node for _, node in gone}
    extra = sum(new.get(name, (0.0, []))[0] - old.get(name, (0.0, []))[0] for name in bare - own)
    return Losses(gone, dict.fromkeys(blamed, max(extra, 0.0) / len(blamed)))


def _around(graph: Graph, site: Site) -> set[str]:
    """Names of the nodes of a site, in all its places, and of those a few steps before and behind them."""
    found = {label for place in site.places for position in place.nodes for label in _labels(graph, position)}
    tensors_on, tensors_back = [place.y for place in site.places], [place.x for place in site.places]
    for _ in range(_REACH + 1):
        readers = [p for tensor in tensors_on for p in graph.readers(tensor)]
        makers = [p for p in map(graph.producer, tensors_back) if p is not None]
        found |= {label for p in (*readers, *makers) for label in _labels(graph, p)}
        tensors_on = [name for p in readers for name in graph.protos[p].output if name]
        tensors_back = [name for p in makers for name in graph.protos[p].input if name]
    return found


def _labels(graph: Graph, position: int) -> tuple[str, str]:
    """A node's own name or the one that it goes by here, and the one that a profile gives it where it has none."""
    return graph.names[position], profiles.label(graph.protos[position])
