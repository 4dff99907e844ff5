"""The report's details in real runs: every figure of the page comes from the JSON, every ratio from its raw samples."""

from __future__ import annotations

import copy
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_lowrank.html import html
from onnx_lowrank.samples import csv_text
from tests.test_html import Page, check

if TYPE_CHECKING:
    from tests.conftest import Written

COMMANDS = ("optimize", "compare")
T_975 = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 6: 2.446912, 7: 2.364624}
"""Student's t, 97.5 %, by degrees of freedom: from a table, not from the code under test."""


def entries(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every latency entry of a report or a comparison."""
    if "models" not in data:
        return list(data["latency"])
    return [e for row in data["models"] for e in (row["latency"], *row["latencies"]) if e]


def medians(a: Sequence[float], b: Sequence[float], groups: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(groups)
    return np.array([np.median(part) for part in np.split(np.log(np.array(a) / np.array(b)), ends[:-1])])


@pytest.mark.parametrize("command", COMMANDS)
def test_statistics_follow_from_the_raw_samples(written: dict[str, Written], command: str) -> None:
    known = entries(written[command].data)
    assert known
    for entry in known:
        for side in ("before", "after"):
            stats, ms = entry[side], np.array(entry[side]["samples_ms"])
            assert len(ms) == stats["runs"] == sum(entry["rounds_by_session"])
            assert stats["p50_ms"] == pytest.approx(np.median(ms), rel=1e-9)
            assert stats["mean_ms"] == pytest.approx(ms.mean(), rel=1e-9)
            if entry["clock"] == "thread":
                assert len(stats["wall_samples_ms"]) == len(ms)
                assert stats["wall_p50_ms"] == pytest.approx(np.median(stats["wall_samples_ms"]), rel=1e-9)
            else:
                assert not {"wall_p50_ms", "wall_samples_ms"} & set(stats)
            assert stats["per_second"] == pytest.approx(1e3 / ms.mean(), rel=1e-9)
            for percent, fewest in ((90, 64), (99, 662)):
                assert (f"p{percent}_ms" in stats) == (len(ms) >= fewest)
                if len(ms) >= fewest:
                    assert stats[f"p{percent}_ms"] == pytest.approx(np.percentile(ms, percent), rel=1e-9)


@pytest.mark.parametrize("command", COMMANDS)
def test_ratios_and_intervals_follow_from_the_raw_samples(written: dict[str, Written], command: str) -> None:
    for entry in entries(written[command].data):
        groups, control = entry["rounds_by_session"], entry["control_ms"]
        before, after = entry["before"]["samples_ms"], entry["after"]["samples_ms"]
        found, noise = medians(before, after, groups), medians(control, before, groups)
        root = math.sqrt(len(groups))
        assert entry["ratio"] == pytest.approx(math.exp(found.mean()), rel=1e-6)
        half = T_975[len(groups) - 1] * max(found.std(ddof=1), noise.std(ddof=1)) / root
        assert entry["ratio_ci"] == pytest.approx([math.exp(found.mean() + s * half) for s in (-1, 1)], rel=1e-5)
        half = T_975[len(groups) - 1] * noise.std(ddof=1) / root
        assert entry["aa_ratio"] == pytest.approx(math.exp(noise.mean()), rel=1e-6)
        assert entry["aa_ratio_ci"] == pytest.approx([math.exp(noise.mean() + s * half) for s in (-1, 1)], rel=1e-5)


KEYS = {
    "accuracy": (
        "samples", "tolerance_abs", "tolerance_rel", "tolerance_of_peak", "cosine", "sqnr_db", "worst_sample",
        "worst_loss", "differing", "top1", "top5",
    ),
    "cold": ("load_ms", "first_run_ms", "peak_bytes", "model_bytes", "processes"),
    "profile": ("before_ms", "after_ms", "saved_ms"),
    "fusions": ("before", "after"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("table", KEYS)
def test_tables_of_details_can_be_recomputed(written: dict[str, Written], command: str, table: str) -> None:
    data, page = written[command].data, Page(written[command].text)
    rows = [dict(row) for row in data[table]]
    for row in rows:
        if table == "cold":
            row["model_bytes"] = row["peak_bytes"] - row["base_bytes"]
        if table == "profile":
            row["saved_ms"] = (row["before_ms"] or 0) - (row["after_ms"] or 0)
    if not rows:
        assert table not in page.tables
        return
    keys = [key for key in KEYS[table] if any(row.get(key) is not None for row in rows)]
    for cells, row in zip(page.rows(table), rows, strict=True):
        numeric = [cell for cell in cells if _is_number(cell)]
        for cell, key in zip(numeric, keys, strict=True):
            check(cell, row.get(key))
        texts = {", ".join(v) if isinstance(v, list) else v for v in row.values() if isinstance(v, str | list)}
        assert {cell[0] for cell in cells if not _is_number(cell) and cell[0] != "–"} <= texts


def _is_number(cell: tuple[str, str | None]) -> bool:
    """Whether a cell stands in a column of numbers: it keeps one, or has none to keep."""
    text, value = cell
    if value is None:
        return text == "–"
    return re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", value) is not None


def test_a_rewritten_site_stands_beside_its_factors(written: dict[str, Written]) -> None:
    data = written["optimize"].data
    rows = {row["node"]: row for row in data["profile"]}
    for site in (s for s in data["sites"] if s["kind"]):
        row = rows[site["node"]]
        assert row["choice"] == site["kind"]
        assert row["before_ms"] > 0
        assert row["after_ms"] > 0
        assert "MatMul" in row["ran_after"]


def test_losses_and_tolerances_agree(written: dict[str, Written]) -> None:
    data = written["optimize"].data
    assert len(data["sample_losses"]) == data["verdict"]["samples"]
    row = next(r for r in data["accuracy"] if r["model"] == "rewritten")
    assert row["worst_loss"] == pytest.approx(max(data["sample_losses"]), rel=1e-6)
    assert data["sample_losses"][row["worst_sample"]] == max(data["sample_losses"])
    assert row["cosine"] == pytest.approx(1, abs=0.01)
    floor = [r for r in data["accuracy"] if r["model"].startswith("original")]
    assert floor
    assert floor[0]["tolerance_of_peak"] < 1e-4


@pytest.mark.parametrize("command", COMMANDS)
def test_csv_has_every_run(written: dict[str, Written], command: str) -> None:
    data = written[command].data
    rows = list(csv.DictReader(io.StringIO(csv_text(data))))
    series = {(r["model"], r["threads"]) for r in rows}
    assert {name for name, _ in series} >= {"original", "rewritten"} if command == "optimize" else len(series) == 4
    for entry in entries(data):
        for ms in (entry["before"]["samples_ms"], entry["after"]["samples_ms"], entry["control_ms"]):
            found = [r for r in rows if r["threads"] == str(entry["threads"])]
            assert {float(r["milliseconds"]) for r in found} >= set(ms)
        if entry["clock"] == "thread":
            wall = {float(r["wall_milliseconds"]) for r in rows if r["clock"] == "thread"}
            assert wall >= {*entry["before"]["wall_samples_ms"], *entry["control_wall_ms"]}
    session = [int(r["session"]) for r in rows if r["model"] == rows[0]["model"] and r["threads"] == rows[0]["threads"]]
    assert session == sorted(session)
    assert len(set(session)) >= 3


def test_a_fresh_process_pays_for_loading(written: dict[str, Written]) -> None:
    for row in written["optimize"].data["cold"]:
        assert row["load_ms"] > 0
        assert row["first_run_ms"] > 0
        assert row["peak_bytes"] > row["base_bytes"] > 1 << 20


def test_a_page_of_an_older_report_still_opens(written: dict[str, Written]) -> None:
    data = dict(written["optimize"].data)
    for key in ("accuracy", "cold", "profile", "fusions", "sample_losses"):
        del data[key]
    assert html(data).count("not measured in this run") >= 2


def test_figures_of_a_card_are_shown_where_a_run_has_them(written: dict[str, Written]) -> None:
    data = copy.deepcopy(written["optimize"].data)
    data["latency"][0]["transfers"] = {"inputs_ms": 0.25, "outputs_ms": 0.125}
    data["environment"]["gpu"] = {"name": "H100", "sm_mhz": 1755}
    data["environment"]["fallback"] = [{"node": "n", "op": "NonZero", "on": "cpu", "why": "no kernel", "ms": 0.5}]
    page = Page(html(data))
    assert any("Transfers, in no other time: inputs 0.250 ms, outputs 0.125 ms." in t for t in page.texts["figcaption"])
    said = {row[0][0]: row[1][0] for row in page.tables["environment"]}
    assert (said["gpu name"], said["gpu sm_mhz"]) == ("H100", "1755")
    assert "fallback" not in said
    assert [text for text, _ in page.rows("fallback")[0]] == ["n", "NonZero", "cpu", "no kernel", "0.5000"]
