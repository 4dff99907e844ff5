"""The Markdown report for pull requests: the same figures as the JSON, and names that stay text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest

from onnx_lowrank.markdown import markdown

if TYPE_CHECKING:
    from tests.conftest import Written


def _rows(text: str, head: str) -> list[list[str]]:
    """Cells of the pipe table whose head row holds `head`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and head in line)
    body = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")])
    return body


def test_the_file_of_a_run_is_a_function_of_its_json(written: dict[str, Written]) -> None:
    run = written["analyze"]
    assert run.text == markdown(run.data)
    assert run.text.startswith("## Would rewrite ")
    assert "No model was written." in run.text


def test_verdict_before_and_after_and_sites(written: dict[str, Written]) -> None:
    data = written["optimize"].data
    text = markdown(data)
    assert text.startswith(f"## {data['verdict']['speedup']:.2f}× faster\n")
    first, *_ = _rows(text, "before | after")
    timed = data["latency"][0]
    assert float(first[1].split()[0]) == pytest.approx(timed["before"]["p50_ms"], rel=0.006)
    assert float(first[2].split()[0]) == pytest.approx(timed["after"]["p50_ms"], rel=0.006)
    assert first[3] == f"{timed['ratio']:.2f}×"
    sites = _rows(text, "| site |")
    gains = sorted((s["ms_before"] - s["ms_after"] for s in data["sites"] if s["kind"]), reverse=True)
    (decimals,) = {len(row[8].partition(".")[2]) for row in sites}  # fewer once a site takes a millisecond
    assert decimals > 0
    assert [float(row[8]) for row in sites] == pytest.approx(gains, abs=0.6 * 10**-decimals)
    assert data["command"] in text
    assert data["environment"]["runtime"] in text


def test_warnings_and_a_comparison(written: dict[str, Written]) -> None:
    data = {**written["optimize"].data, "warnings": ["noise above 2.5 %"]}
    assert "> **Warning:** noise above 2.5 %" in markdown(data)
    compared = written["compare"].data
    rows = _rows(markdown(compared), "| model |")
    assert len(rows) == 3
    assert float(rows[1][2]) == pytest.approx(compared["models"][1]["latency"]["ratio"], abs=6e-4)


@pytest.mark.parametrize("command", ["optimize", "compare"])
def test_it_carries_the_facts_of_the_page(written: dict[str, Written], command: str) -> None:
    data = written[command].data
    text = markdown(data)
    entry = data["latency"][0] if command == "optimize" else data["models"][1]["latency"]
    control = "{:.3f}–{:.3f}".format(*entry["aa_ratio_ci"])
    assert f": {control}" in next(line for line in text.splitlines() if line.startswith("- A/A control"))
    head = next(line for line in text.splitlines() if line.startswith("| timed with"))
    assert "p50 ms" in head
    assert "| speed-up | 95 % interval |" in head
    assert len(_rows(text, "| load ms |")) == len(data["cold"])
    nodes = [row[0].strip("`") for row in _rows(text, "| node |") if "→" not in row[0]]
    assert 0 < len(nodes) <= 10
    assert set(nodes) <= {row["node"] for row in data["profile"]}
    if command == "optimize":
        assert len(_rows(text, "| rewritten | sites ms |")) == len(data["pareto"])
    assert text.count("<details>") == text.count("</details>") >= 4


def test_names_out_of_a_model_are_text(written: dict[str, Written]) -> None:
    data = copy.deepcopy(written["optimize"].data)
    data["sites"][0]["node"] = "a|b`` <script>\n# head"
    data["warnings"] = ["<img src=x> [link](x) | *bold*"]
    text = markdown(data)
    assert "```a\\|b`` <script> # head```" in text
    assert "\\<img src=x\\> \\[link\\](x) \\| \\*bold\\*" in text
    assert all(len(row) == len(_rows(text, "| site |")[0]) for row in _rows(text, "| site |"))


@pytest.mark.parametrize("part", ["latency", "sites", "pareto", "environment", "command", "warnings", "kept"])
def test_missing_parts_are_left_out(written: dict[str, Written], part: str) -> None:
    data = {key: value for key, value in written["optimize"].data.items() if key != part}
    assert markdown(data).startswith("## ")
