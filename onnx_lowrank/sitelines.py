"""Sites and their choice in the terminal, a line or two each however narrow it is."""

from __future__ import annotations

import itertools
from typing import Final

from rich.table import Table

from onnx_lowrank import figures, grids, views
from onnx_lowrank.fragment import size_text
from onnx_lowrank.plan import Decision
from onnx_lowrank.report import Report
from onnx_lowrank.sites import Why
from onnx_lowrank.views import Column

_TOP: Final = 12
_NAME: Final = 28
"""With so many characters for a name, reasons are still spelled out."""
_WIDE: Final = 120
"""From this width on there is room for what a fit stands on."""

_SHORT: Final = {
    Why.TOO_SMALL: "too small",
    Why.NOT_TIMED: "not timed",
    Why.NOT_FASTER: "none faster",
    Why.LOSS: "too much loss",
    Why.IN_FLOAT: "left in float",
    Why.GIVEN_BACK: "given back",
}


def table(report: Report, width: int, *, everything: bool) -> tuple[Table, list[str]]:
    """The sites that gained most first, and lines below them that spell out reasons that were shortened.

    Args:
        everything: all of them, and from 120 columns on what their fits stand on.
    """
    ordered = sorted(report.plan.decisions, key=lambda d: -((d.ms_before or 0) - (d.ms_after or d.ms_before or 0)))
    shown = ordered if everything else ordered[:_TOP]
    more = ("positions", "effective rank") if everything and width >= _WIDE else ()
    columns = [
        Column("site", numeric=False),
        Column("weight"),
        Column("choice", numeric=False),
        *(Column(name) for name in ("ms", "error", *more)),
    ]
    prefix = _shared_path([d.node for d in ordered])
    rows = [_row(d, prefix, report, bool(more), short=False) for d in shown]
    below: list[str] = []
    if not grids.fits(columns, rows, width, _NAME):
        rows = [_row(d, prefix, report, bool(more), short=True) for d in shown]
        below = _spelled_out(shown, views.dense_reasons(report.to_dict()))
    if len(ordered) > len(shown):
        rows.append([f"… {len(ordered) - len(shown)} more", *[""] * (len(columns) - 1)])
    return grids.grid(columns, rows, width, lines=2), below


def _row(d: Decision, prefix: int, report: Report, basis: bool, *, short: bool) -> list[str]:
    ms = "" if d.ms_before is None else f"{d.ms_before:.3f}"
    ms += f" → {d.ms_after:.3f}" if d.kind and d.ms_after is not None else ""
    error = "" if d.error is None else f"{d.error:.4f}"
    cells = [d.node[prefix:], f"{d.shape[0]}×{d.shape[1]}", _choice(d, short=short), ms, error]
    if not basis:
        return cells
    known = report.evidence.get(d.node)
    return [*cells, *((f"{known.positions}", f"{known.effective_rank:.0f} of {known.width}") if known else ("", ""))]


def _choice(d: Decision, *, short: bool) -> str:
    if d.kind:
        return f"{d.kind} {size_text(d.rank or 0, d.inner)}"
    if d.why is None:
        return "dense"
    return f"dense: {_SHORT.get(d.why) or figures.middle(d.why.value, 16) if short else d.why.value}"


def _spelled_out(shown: list[Decision], reasons: dict[str, int]) -> list[str]:
    """What short reasons stand for, of those that are shown, with the number of all sites."""
    cut = {d.why.value: _SHORT[d.why] for d in shown if not d.kind and d.why in _SHORT}
    used = {reason: name for reason, name in cut.items() if not reason.startswith(name)}
    known = {d.why.value for d in shown if not d.kind and d.why}
    return [
        f"  {n} site{'' if n == 1 else 's'} dense{f', {used[reason]}' if reason in used else ''}: {reason}"
        for reason, n in reasons.items()
        if reason in known
    ]


def _shared_path(names: list[str]) -> int:
    """Length of the leading path, up to a slash, that all names share."""
    if len(names) < 2:
        return 0
    low, high = min(names).split("/"), max(names).split("/")  # what the extremes share, all share
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low[:-1], high[:-1], strict=False))
    return sum(len(part) + 1 for part, _ in shared)
