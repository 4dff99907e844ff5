"""Tables for the terminal in which a row is a line: names give way, and nothing is cut twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.cells import cell_len
from rich.table import Table

from onnx_lowrank import figures
from onnx_lowrank.views import Column
from onnx_lowrank.views import Table as Given

_GAP: Final = 2
LEAST: Final = 12
"""Characters that a name keeps at least."""


def grid(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, names: Sequence[int] = (0,), lines: int = 1
) -> Table:
    """Columns under their heads, numbers to the right.

    Where they do not fit, heads are broken at spaces, then the longest of the names lose their middles.

    Args:
        names: places of the columns that may be shortened.
        lines: that a name may take before it is.
    """
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False)
    widths = [max(cell_len(c.name), *(cell_len(r[i]) for r in rows), 1) for i, c in enumerate(columns)]
    if _total(widths) > width:
        widths = [max(_longest_word(c.name), *(cell_len(r[i]) for r in rows), 1) for i, c in enumerate(columns)]
        for place, room in _shared_room({i: widths[i] for i in names}, _total(widths) - width).items():
            widths[place] = room
    for column, room in zip(columns, widths, strict=True):
        table.add_column(column.name, justify="right" if column.numeric else "left", width=room, overflow="fold")
    for row in rows:
        table.add_row(*(figures.middle(cell, widths[i] * lines) if i in names else cell for i, cell in enumerate(row)))
    return table


def fits(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, name: int) -> bool:
    """Whether a row is one line when the first column has `name` characters."""
    folded = [max(_longest_word(c.name), *(cell_len(r[i]) for r in rows), 1) for i, c in enumerate(columns)]
    return _total([min(name, folded[0]), *folded[1:]]) <= width


def of(given: Given, width: int, kept: Sequence[str] | None = None) -> Table:
    """A table of the reports; the columns called `kept` where they are named. Its texts are what may be shortened."""
    places = [i for i, column in enumerate(given.columns) if kept is None or column.name in kept]
    columns = [given.columns[i] for i in places]
    rows = [[row[i].text for i in places] for row in given.rows]
    return grid(columns, rows, width, [i for i, column in enumerate(columns) if not column.numeric])


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _longest_word(head: str) -> int:
    return max((cell_len(word) for word in head.split()), default=0)


def _shared_room(wanted: Mapping[int, int], excess: int) -> dict[int, int]:
    """Widths of the names after `excess` characters were taken from the longest of them, one by one."""
    room = dict(wanted)
    while excess > 0 and room:
        longest = max(room, key=lambda place: room[place])
        if room[longest] <= LEAST:
            break
        room[longest] -= 1
        excess -= 1
    return room
