"""The plan: a decision for every site, frozen, JSON, bound to the model. Decided before anything is rewritten."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.scheme import Scheme
from onnx_lowrank.sites import Site, Why

SCHEMA = 3


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one site: a kind at a rank, or the reason why it keeps its weight.

    `inner` is the rank of the first factor of a kind that has two (`tucker`, `asym3d`, `branch2` …), whose `rank` is
    that of the last; else 0.
    `partner` is the other site of a hidden layer that becomes narrower (kind `nystrom`, where the rank is its width);
    `sharers` are the sites that share a first factor (kind `shared`, all of one rank), this one among them.
    `ms_*` are milliseconds of the fragment alone or, where the profile of the whole model corrected them, the corrected
    ones; `error` is the exact relative error of the site's own output, `loss` what it was estimated to cost the model's
    outputs.
    `tied` are the other nodes that read the same weight: they become the same, and all figures are of all of them.
    """

    node: str
    op: str
    shape: tuple[int, int]
    kind: str | None = None
    rank: int | None = None
    why: Why | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    error: float | None = None
    loss: float | None = None
    partner: str | None = None
    inner: int = 0
    sharers: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @classmethod
    def of(cls, site: Site, ms: float | None = None) -> Decision:
        """No decision yet about a site, whose dense weight takes some milliseconds."""
        g = site.geometry
        return cls(site.name, g.op, (g.outputs, g.inputs), ms_before=ms, tied=tuple(t.name for t in site.twins))

    def keep(self, why: Why) -> Decision:
        """The same site, kept dense for a reason."""
        dense = Decision(self.node, self.op, self.shape, why=why, ms_before=self.ms_before, tied=self.tied)
        return dataclasses.replace(dense, ms_after=self.ms_before)


@dataclasses.dataclass(frozen=True)
class Refit:
    """One repair with data: the ranks whose rewritten prefix gave the inputs, and the sites that took new factors.

    Attributes:
        ranks: node, kind, rank and inner rank of every site that was rewritten then; later ranks may be others.
        kept: nodes.
        near: node, rank and inner rank of factors of the same kind that were made ready beside those.
    """

    ranks: tuple[tuple[str, str, int, int], ...]
    kept: tuple[str, ...]
    near: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, decisions: Iterable[Decision], kept: Iterable[str], near: Iterable[tuple[str, int, int]] = ()) -> Refit:
        """The record of a repair of a plan."""
        return cls(
            tuple((d.node, d.kind, d.rank, d.inner) for d in decisions if d.kind and d.rank), tuple(kept), tuple(near)
        )

    def plan(self, decisions: Iterable[Decision]) -> tuple[Decision, ...]:
        """The same sites with the kinds and ranks of then."""
        then = {node: (kind, rank, inner) for node, kind, rank, inner in self.ranks}
        return tuple(
            dataclasses.replace(d, kind=kind, rank=rank, inner=inner)
            for d in decisions
            for kind, rank, inner in [then.get(d.node, (None, None, 0))]
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Decisions for all sites of one model, and what they stand on.

    Attributes:
        model_sha256: of the model file that was planned.
        data: sources, seed and number of samples that the factors are fitted to.
        max_loss: limit of the metric that the plan was made for; None when the goal was a speed or a size.
        confidence: how sure `max_loss` was held to.
        metric: what the loss is.
        output_weights: weight of an output in the loss, by name.
        policy: how the ranks were chosen.
        refits: repairs of the factors with data, in their order.
        provider_options: what the provider was given.
        scheme: how the precision is made that was planned for; None is the model's own.
        shapes: of synthetic inputs and timings, one set after the other.
        merges: neighbours that were multiplied before anything else, the first one of each taken into the second.
    """

    model_sha256: str
    decisions: tuple[Decision, ...]
    max_loss: float | None
    provider: str
    threads: int
    seed: int
    samples: int
    data: tuple[str, ...] = ()
    shapes: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...] = ()
    confidence: float = 0.5
    metric: str = "relative"
    output_weights: tuple[tuple[str, float], ...] = ()
    policy: str = "knapsack"
    refits: tuple[Refit, ...] = ()
    provider_options: tuple[tuple[str, str], ...] = ()
    scheme: Scheme | None = None
    merges: tuple[tuple[str, str], ...] = ()

    @property
    def rewritten(self) -> tuple[Decision, ...]:
        """The decisions that change a site."""
        return tuple(d for d in self.decisions if d.kind is not None)

    def giving_back(self, nodes: Iterable[str]) -> Plan:
        """The same plan with some sites kept dense, and those that were decided together with them too."""
        names = set(nodes)
        given = [d for d in self.decisions if d.node in names]
        names |= {other for d in given for other in (*d.sharers, *([d.partner] if d.partner else []))}
        changed = (d.keep(Why.GIVEN_BACK) if d.node in names and d.kind else d for d in self.decisions)
        return dataclasses.replace(self, decisions=tuple(changed))

    def to_json(self) -> str:
        """Text of the plan file: reviewed, committed, replayed by `apply`."""
        table = {"schema": SCHEMA, **dataclasses.asdict(self)}
        table["decisions"] = [{**dataclasses.asdict(d), "why": d.why and d.why.name} for d in self.decisions]
        table["shapes"] = [{name: list(shape) for name, shape in group} for group in self.shapes]
        table["output_weights"] = dict(self.output_weights)
        table["provider_options"] = dict(self.provider_options)
        return json.dumps(table, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Read a plan file.

        Raises:
            SettingsError: not JSON, another schema, or fields missing, unknown or of the wrong form.
        """
        try:
            table = json.loads(text)
            if table.pop("schema") != SCHEMA:
                raise SettingsError(f"{where}: a plan of another schema; make it again with this version")
            table["decisions"] = tuple(_decision(row) for row in table["decisions"])
            table["data"] = tuple(table["data"])
            table["scheme"] = Scheme.from_table(table.get("scheme"))
            table["refits"] = tuple(_refit(row) for row in table["refits"])
            table["output_weights"] = tuple(table["output_weights"].items())
            table["provider_options"] = tuple(table.get("provider_options", {}).items())
            table["merges"] = tuple((str(a), str(b)) for a, b in table.get("merges", ()))
            table["shapes"] = tuple(
                tuple((name, tuple(shape)) for name, shape in group.items()) for group in table["shapes"]
            )
            return cls(**table)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise SettingsError(f"{where}: not a plan of onnx-lowrank ({fault}); make one with --plan-out") from None


def _refit(row: dict[str, Any]) -> Refit:
    ranks = tuple((str(node), str(kind), int(rank), int(inner)) for node, kind, rank, inner in row["ranks"])
    near = tuple((str(node), int(rank), int(inner)) for node, rank, inner in row["near"])
    return Refit(ranks, tuple(str(node) for node in row["kept"]), near)


def _decision(row: dict[str, Any]) -> Decision:
    why = Why[row["why"]] if row["why"] else None
    kind, rank = row["kind"], row["rank"]
    if (kind is None) != (rank is None) or (rank is not None and (not isinstance(rank, int) or rank < 1)):
        raise ValueError(f"kind {kind!r} and rank {rank!r} of node {row['node']!r} do not go together")
    names = {field: tuple(str(node) for node in row.get(field, ())) for field in ("sharers", "tied")}
    return Decision(**{**row, "why": why, "shape": tuple(row["shape"]), **names})
