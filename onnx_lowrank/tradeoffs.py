"""Charts of one quantity against another: the Pareto frontier, and the rank staircases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from onnx_lowrank import figures, svg
from onnx_lowrank.figures import middle
from onnx_lowrank.views import choice, chosen_point

Json = Mapping[str, Any]
_LEFT, _RIGHT, _TOP = 44.0, svg.WIDTH - 12.0, 46.0
_FAR: Final = 100.0
"""Losses beyond this are wrecked outputs: they stand in the table, and would press the rest of a chart flat."""


def frontier(report: Json) -> str:
    """Loss against time of the plans that were built: predicted curve, measured points, the chosen one, the limit."""
    points = [p for p in report.get("pareto") or () if figures.finite(p.get("ms"))]
    limit = (report.get("verdict") or {}).get("loss_limit")
    limits = [float(limit)] if figures.finite(limit) and limit > 0 else []
    drawn = {k: [(float(p["ms"]), float(p[k])) for p in points if _drawable(p.get(k))] for k in _SERIES}
    values = [v for series in drawn.values() for _, v in series]
    if not values:
        return ""
    bottom = 290.0
    x = svg.linear([ms for series in drawn.values() for ms, _ in series], _LEFT, _RIGHT)
    y = svg.logarithmic(values + limits, bottom, _TOP)
    parts = [svg.legend(_SERIES.values(), 10), svg.y_axis(y, _LEFT, _RIGHT, "loss (log)")]
    parts.append(svg.x_axis(x, _TOP, bottom, "milliseconds, sum over the sites"))
    for value in limits:
        parts.append(svg.line(_LEFT, y(value), _RIGHT, y(value), "limit"))
        parts.append(svg.label(_RIGHT - 2, y(value) - 5, f"limit {figures.short(value, 1)}", "tick limit-name", "end"))
    parts.append(svg.path([(x(ms), y(v)) for ms, v in sorted(drawn["predicted"])], "s0 curve"))
    for name, series in drawn.items():
        class_ = _SERIES[name][0]
        parts += [svg.dot(x(ms), y(v), class_, f"{name} loss {v}, sites {ms} ms", 4) for ms, v in series]
    chosen = chosen_point(report)
    if chosen and _drawable(chosen.get("loss")):
        px, py = x(float(chosen["ms"])), y(float(chosen["loss"]))
        parts.append(svg.tag("circle", cx=px, cy=py, r=8, class_="chosen"))
        end = px > svg.WIDTH / 2
        parts.append(svg.label(px + (-13 if end else 13), py + 4, "chosen", "name s1", "end" if end else "start"))
    return svg.drawing("Pareto frontier", bottom + 40, *parts)


_SERIES: Final = {"predicted": ("s0 hollow", "predicted"), "loss": ("s1 fill", "measured on the built model")}


def _drawable(value: Any) -> bool:
    return figures.finite(value) and 0 < value < _FAR


@dataclasses.dataclass(frozen=True)
class _Label:
    """Where the words beside a point stand."""

    words: str
    x: float
    y: float
    anchor: str

    def covers(self, other: _Label) -> bool:
        """Whether two labels would be written over each other."""
        (a, b), (c, d) = self._ends(), other._ends()
        return abs(self.y - other.y) < _LINE and a < d and c < b

    def _ends(self) -> tuple[float, float]:
        wide = _GLYPH * len(self.words)
        return (self.x - wide, self.x) if self.anchor == "end" else (self.x, self.x + wide)


def _labels(points: Sequence[tuple[str, float, float]], top: float, bottom: float) -> list[_Label]:
    """A label for each point on its roomier side; near points' labels go above each other."""
    found: list[_Label] = []
    for name, px, py in points:
        end = px > svg.WIDTH / 2
        x = px + (-9 if end else 9)
        words = middle(name, int((x if end else svg.WIDTH - x) / _GLYPH))
        free = [_Label(words, x, py - 8 + step, "end" if end else "start") for step in _STEPS]
        free = [one for one in free if top - 6 < one.y < bottom]
        found.append(next((one for one in free if not any(one.covers(other) for other in found)), free[0]))
    return found


_LINE, _GLYPH, _NEAR = 14.0, 7.2, 24.0
_STEPS: Final = tuple(sign * k * _LINE for k in range(16) for sign in ((1, -1) if k else (1,)))


def models(rows: Sequence[tuple[str, float, float]]) -> str:
    """Loss of compared models against their median latency: (name, ms, loss)."""
    if len(rows) < 2:
        return ""
    top, bottom = 28.0, 240.0
    x = svg.linear([ms for _, ms, _ in rows], _LEFT + 12, _RIGHT)
    y = svg.linear([*(v for _, _, v in rows), 1e-12], bottom, top, zero=True)
    parts = [svg.y_axis(y, _LEFT + 12, _RIGHT, "loss against the first model")]
    parts.append(svg.x_axis(x, top, bottom, "p50, milliseconds per run"))
    places = _labels([(name, x(ms), y(loss)) for name, ms, loss in rows], top, bottom)
    for i, ((name, ms, loss), place) in enumerate(zip(rows, places, strict=True)):
        class_ = svg.series(i)
        if abs(place.y - y(loss)) > _NEAR:
            near = place.y if place.y < y(loss) else place.y - 9
            parts.append(svg.line(x(ms), y(loss), place.x, near, f"{class_} leader"))
        parts.append(svg.dot(x(ms), y(loss), f"{class_} fill", f"{name}: {ms} ms, loss {loss}", 5))
        parts.append(svg.label(place.x, place.y, place.words, "name", place.anchor))
    return svg.drawing("Loss against latency", bottom + 40, *parts)


def staircases(report: Json) -> list[tuple[str, str, str]]:
    """A chart for each geometry, those that take most of the time first: (title, detail, chart)."""
    found = []
    for key, times in (report.get("staircases") or {}).items():
        users = [s for s in report.get("sites") or () if _stands_for(s, key, times)]
        head, _, detail = key.partition(" float")
        detail = f"float{detail}" if detail else ""
        count = f"{len(users)} site{'' if len(users) == 1 else 's'}" if users else ""
        title = re.sub(r"(\d)x(\d)", r"\1×\2", head)
        weight = sum(float(s["ms_before"]) for s in users)
        if chart := staircase(title, times, users):
            found.append((weight, title, " · ".join(t for t in (count, detail) if t), chart))
    return [rest for _, *rest in sorted(found, key=lambda row: -row[0])]  # type: ignore[misc]


def _stands_for(site: Json, key: str, times: Json) -> bool:
    """Whether the times of a geometry are the ones that decided this site: same operator, weight and dense time."""
    shape = "x".join(str(n) for n in site.get("shape") or ())
    same = key.startswith(f"{site.get('op')} {shape} ")
    return same and site.get("ms_before") is not None and site.get("ms_before") == times.get("dense")


def staircase(title: str, times: Json, users: Sequence[Json]) -> str:
    """Milliseconds by rank, a line for each kind, the dense weight, rings around the ranks that were chosen."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for label, ms in times.items():
        kind, rank = label.rpartition(" ")[0], re.search(r"\d+$", label)
        if kind and rank and figures.finite(ms):
            lines.setdefault(kind, []).append((int(rank[0]), float(ms)))
    dense = times.get("dense")
    if not lines:
        return ""
    bottom, values = 190.0, [ms for row in lines.values() for _, ms in row]
    x = svg.linear([0, *(rank for row in lines.values() for rank, _ in row)], _LEFT, _RIGHT)
    x = svg.Axis(0, x.high, _LEFT, _RIGHT)
    y = svg.linear([*values, dense] if figures.finite(dense) else values, bottom, _TOP, zero=True)
    names = [(_class(kind), kind) for kind in sorted(lines)]
    parts = [svg.legend([*names, ("dense-swatch", "dense")], 10), svg.y_axis(y, _LEFT, _RIGHT, "ms")]
    parts.append(svg.x_axis(x, _TOP, bottom, "rank"))
    if figures.finite(dense):
        parts.append(svg.line(_LEFT, y(dense), _RIGHT, y(dense), "dense"))
    for kind in sorted(lines):
        row = sorted(lines[kind])
        parts.append(svg.path([(x(rank), y(ms)) for rank, ms in row], f"{_class(kind)} curve"))
        parts += [svg.dot(x(rank), y(ms), _class(kind), f"{kind} {rank}: {ms} ms", 2.4) for rank, ms in row]
    for name, rank in sorted({(choice(s), s["rank"]) for s in users if s.get("kind")}):
        if figures.finite(ms := times.get(name)):
            parts.append(svg.tag("circle", cx=x(rank), cy=y(ms), r=6.5, class_="chosen"))
    return svg.drawing(f"Milliseconds by rank, {title}", bottom + 40, *parts)


_KINDS: Final = ("svd", "conv_svd", "pivot", "spatial", "tucker", "asym3d", "branch", "shared", "nystrom", "heads")


def _class(kind: str) -> str:
    """A kind has one colour in every chart; svd and conv_svd are the same factorisation and never meet."""
    kind = kind.rstrip("248")  # the groups of a `branch`
    index = max(_KINDS.index(kind), 1) if kind in _KINDS else len(_KINDS)
    return f"k{index} fill"
