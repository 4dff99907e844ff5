"""The HTML report: every figure comes from its JSON, nothing is fetched, nothing that a model says is executed."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from onnx_lowrank import output
from onnx_lowrank.errors import RuntimeMissing
from onnx_lowrank.html import html

if TYPE_CHECKING:
    from tests.conftest import Written

HOSTILE = '"></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


class Page(HTMLParser):
    """Tables by id as rows of (text, data-value), elements counted, the text of scripts, chart tips."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._table = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elements.append((tag, known))
        if tag == "table":
            self._table = str(known["id"]).removeprefix("table-")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append(("", known.get("data-value")))
        if tag not in ("meta", "link", "wbr", "input", "br", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if "td" in self._open or "th" in self._open:
            text, value = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (text + data, value)

    def rows(self, table: str) -> list[list[tuple[str, str | None]]]:
        """Body rows: those after the head, of a table that has one."""
        return self.tables[table][1:]


def printed(text: str) -> tuple[float, float]:
    """The value that a text says, and half a unit of its last digit."""
    found = re.fullmatch(r"(?:of )?(-?\d+(?:\.(\d+))?(?:e(-?\d+))?)(?: ?(k|M|G)?(?:B|ms|×|%|s)?)? ?", text)
    assert found, text
    number, decimals, exponent, prefix = found.groups()
    scale = PREFIXES.get(prefix or "", 1.0) * 10.0 ** int(exponent or 0)
    percent = 0.01 if text.endswith("%") else 1.0
    return float(number) * PREFIXES.get(prefix or "", 1.0) * percent, 0.51 * 10.0 ** -len(decimals or "") * scale * percent  # fmt: skip  # noqa: E501


def check(cell: tuple[str, str | None], wanted: float | None) -> None:
    """A cell prints a number within its rounding and keeps it in full; nothing measured is a dash."""
    text, value = cell
    if wanted is None:
        assert (text, value) == ("–", None)
        return
    said, half_digit = printed(text)
    assert abs(said - wanted) <= half_digit
    assert value is not None
    assert float(value) == pytest.approx(wanted, rel=1e-12)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


def embedded(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("command", ["optimize", "compare"])
def test_the_json_is_inside_and_the_page_is_a_function_of_it(written: dict[str, Written], command: str) -> None:
    run = written[command]
    assert embedded(run.text) == run.data
    assert html(run.data) == run.text


def test_the_verdict_says_the_figures_of_the_json(written: dict[str, Written]) -> None:
    data, page = written["optimize"].data, Page(written["optimize"].text)
    verdict = data["verdict"]
    assert page.texts["h1"] == [f"{verdict['speedup']:.2f}× faster"]
    low, high = verdict["speedup_ci"]
    (line,) = [t for t in page.texts["p"] if t.startswith("95 %")]
    assert f"{low:.2f}–{high:.2f}" in line
    loss, limit = re.findall(r"[\d.e-]+(?= of | allowed)", line)
    assert float(loss) == pytest.approx(verdict["loss"], rel=0.06)
    assert float(limit) == verdict["loss_limit"]


def test_before_and_after_can_be_recomputed(written: dict[str, Written]) -> None:
    data, rows = written["optimize"].data, Page(written["optimize"].text).rows("before-after")
    wanted: list[tuple[float, float, float]] = [
        (e["before"]["p50_ms"], e["after"]["p50_ms"], e["ratio"]) for e in data["latency"]
    ]
    old, new = data["model"]["before"], data["model"]["after"]
    wanted += [(old[k], new[k], new[k] / old[k]) for k in ("bytes", "parameters", "macs")]
    wanted.append((0, data["verdict"]["loss"], data["verdict"]["loss_limit"]))
    assert len(rows) == len(wanted)
    for row, values in zip(rows, wanted, strict=True):
        for cell, value in zip(row[1:], values, strict=True):
            check(cell, value)


def test_latency_can_be_recomputed(written: dict[str, Written]) -> None:
    data, page = written["optimize"].data, Page(written["optimize"].text)
    rows = iter(page.rows("latency"))
    sides = [entry[side] for entry in data["latency"] for side in ("before", "after")]
    keys = dict.fromkeys(k for side in sides for k, v in side.items() if isinstance(v, int | float))
    for entry in data["latency"]:
        for side in ("before", "after"):
            cells = next(rows)[2:]
            for cell, key in zip(cells[2:], keys, strict=True):
                check(cell, entry[side].get(key))
            check(cells[0], entry["ratio"] if side == "after" else None)
            ends = "{:.3f}–{:.3f}".format(*entry["ratio_ci"]) if side == "after" else "–"
            assert cells[1][0] == ends


def test_sites_and_frontier_can_be_recomputed(written: dict[str, Written]) -> None:
    data, page = written["optimize"].data, Page(written["optimize"].text)
    inside = {row["node"]: row["before_ms"] for row in data["profile"] if row["before_ms"]}
    by_name = {site["node"]: site for site in data["sites"]}
    rows = page.rows("sites")
    assert len(rows) == len(by_name)
    for name, op, weight, spectrum, choice, share, old, new, saved, error, loss, *reason in rows:
        site = by_name.pop("/encoder/" + name[0])
        assert op[0] == site["op"]
        assert weight[0] == "×".join(map(str, site["shape"]))
        assert spectrum[0] == " · ".join(str(rank) for _, rank in site["spectrum"])
        assert choice[0] == (f"{site['kind']} {site['rank']}" if site["kind"] else "dense")
        before, after = site["ms_before"], site["ms_after"]
        wanted = (
            inside[site["node"]] / sum(inside.values()),
            before,
            after,
            before - after,
            site["error"],
            site["loss"],
        )
        for cell, value in zip((share, old, new, saved, error, loss), wanted, strict=True):
            check(cell, value)
        assert [text for text, _ in reason] == ([site["reason"] or ""] if reason else [])
    for row, point in zip(page.rows("pareto"), data["pareto"], strict=True):
        for cell, key in zip(row, ("rewritten", "ms", "predicted", "loss"), strict=False):
            check(cell, point[key])
    assert [row[-1][0] for row in page.rows("pareto")].count("chosen") == 1


def test_the_small_tables_can_be_recomputed(written: dict[str, Written]) -> None:
    data, page = written["optimize"].data, Page(written["optimize"].text)
    assert [(row[1][0], row[0][0]) for row in page.tables["kept"]] == [(k, str(n)) for k, n in data["kept"].items()]
    for (stage, cell), (name, seconds) in zip(page.tables["seconds"], data["seconds"].items(), strict=True):
        assert stage[0] == name
        check(cell, seconds)
    said = {row[0][0]: row[1][0] for row in page.tables["environment"]}
    assert {k: str(v) for k, v in data["environment"].items()}.items() <= said.items()
    assert said["after, sha256"] == data["model"]["after"]["sha256"]
    known = {"before-after", "latency", "pareto", "sites", "kept", "seconds", "environment", "dense"}
    details = {"accuracy", "cold", "profile", "fusions"}  # tests/test_details.py
    assert set(page.tables) <= known | details, "a table that no test recomputes"


def test_a_comparison_can_be_recomputed(written: dict[str, Written]) -> None:
    data, page = written["compare"].data, Page(written["compare"].text)
    first = data["models"][1]["latency"]["before"]
    for row, model in zip(page.rows("models"), data["models"], strict=True):
        timed = model["latency"]
        check(row[1], (timed["after"] if timed else first)["p50_ms"])
        check(row[2], timed and timed["ratio"])
        for cell, key in zip(row[4:], ("bytes", "parameters", "loss"), strict=True):
            check(cell, model[key])
    assert set(page.tables) - {"accuracy", "cold", "profile", "fusions"} == {"models", "latency", "environment"}


@pytest.mark.parametrize("command", ["optimize", "analyze", "compare"])
def test_every_chart_tip_says_numbers_of_the_json(written: dict[str, Written], command: str) -> None:
    data = written[command].data
    known = set(numbers(data))
    tips = [tip for tip in Page(html(data)).texts["title"][1:] if " runs, " not in tip]
    said = [float(n) for tip in tips for n in re.findall(r"\d+\.\d{5,}(?:e-?\d+)?", tip)]
    assert len(said) > 3
    controls = {sum(e["aa_ratio_ci"]) / 2 for e in data.get("latency") or ()}
    assert {n for n in said if n not in known | controls} == set()


def test_raw_samples_become_histograms_that_count_every_run(written: dict[str, Written]) -> None:
    data = copy.deepcopy(written["optimize"].data)
    for entry in data["latency"]:
        for side, middle in (("before", 5.0), ("after", 4.0)):
            entry[side]["samples_ms"] = [middle + i / 100 for i in range(100)] + [90.0]
    page = Page(html(data))
    drawn = sum(int(tip.partition(" ")[0]) for tip in page.texts["title"] if re.match(r"\d+ runs, ", tip))
    assert drawn == 4 * 100
    assert sum("101 runs, 1 beyond the axis" in text for text in page.texts["text"]) == 4


PARTS = ("latency", "pareto", "sites", "staircases", "kept", "seconds", "environment", "warnings", "command", "model")


@pytest.mark.parametrize("part", PARTS)
def test_what_was_not_measured_is_said(written: dict[str, Written], part: str) -> None:
    whole = written["optimize"].data
    without = {key: value for key, value in whole.items() if key != part}
    emptied = {**whole, part: type(whole[part])()}
    for data in (without, emptied):
        page = html(data)
        assert embedded(page) == data
        if part in ("latency", "pareto", "staircases"):
            assert page.count("not measured in this run") > html(whole).count("not measured in this run")


def test_a_model_that_could_not_be_compared_leaves_the_rest(written: dict[str, Written]) -> None:
    data = copy.deepcopy(written["compare"].data)
    data["models"].append({"path": "broken.onnx", "error": "not an ONNX model", "latency": None})
    page = html(data)
    assert "<strong>broken.onnx</strong> could not be compared: not an ONNX model" in page
    assert len(Page(page).rows("models")) == 4


def test_infinite_and_missing_losses_do_not_break_the_page(written: dict[str, Written]) -> None:
    data = copy.deepcopy(written["optimize"].data)
    data["pareto"] += [{"rewritten": 3, "ms": 1.0, "predicted": 0.0, "loss": 1e30}, {"rewritten": 3, "ms": None}]
    data["verdict"]["loss"] = None
    data["sites"][0] |= {"ms_before": None, "ms_after": None, "error": None}
    assert "1.0e30" in html(data)


def hostile(value: Any) -> Any:
    """The same report with a hostile text after every text that a model or a user can choose."""
    if isinstance(value, dict):
        return {f"{k}{HOSTILE}" if " " in k else k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) and value != "optimized" else value


@pytest.mark.parametrize("command", ["optimize", "analyze", "compare"])
def test_names_out_of_a_model_are_text(written: dict[str, Written], command: str) -> None:
    data = hostile(written[command].data)
    data["accuracy"] = data["profile"] = [{HOSTILE: HOSTILE, "n": 1.5}]
    data["warnings"] = [HOSTILE]
    text = html(data)
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert embedded(text) == data
    assert "49" not in page.texts["li"][0]


@pytest.mark.parametrize("command", ["optimize", "compare"])
def test_the_page_is_small_and_refers_to_nothing_outside(written: dict[str, Written], command: str) -> None:
    text = written[command].text
    assert len(text.encode()) < 6e6
    links = [a[k] or "" for _, a in Page(text).elements for k in ("src", "href", "action", "data", "poster") if k in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_without_jinja2_the_extra_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeMissing, match=r"onnx-lowrank\[report\]"):
        output.check({"--report": tmp_path / "r.html"})
    output.check({"--report": tmp_path / "r.md"})
