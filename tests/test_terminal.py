"""What the terminal shows: rows of a line or two however narrow it is, sentences that are not broken, the command."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from onnx_lowrank import figures, grids, sidebyside, terminal
from onnx_lowrank.evidence import Evidence
from onnx_lowrank.measure import Latency
from onnx_lowrank.plan import Decision, Plan
from onnx_lowrank.report import ModelFacts, Report, Verdict
from onnx_lowrank.sites import Keep, Why
from onnx_lowrank.timing import Ratio
from onnx_lowrank.views import Column

STEM = "/model/encoder/layer."
PARTS = ("attention/self/query/MatMul", "attention/output/dense/MatMul", "intermediate/[dense]/MatMul")
COMMAND = "onnx-lowrank analyze bert.onnx --data samples.npz --max-loss 0.005 --kinds svd,pivot,spatial --seed 7"


def decisions() -> tuple[Decision, ...]:
    found = []
    for i, why in enumerate(
        (None, *(w for w in Why if w.name in ("NOT_FASTER", "LOSS", "GIVEN_BACK", "SPARSE")), None)
    ):
        name = f"{STEM}{i}/{PARTS[i % 3]}"
        kept: dict[str, Any] = {"kind": "conv_svd", "rank": 128, "inner": 256, "ms_after": 112.345, "error": 0.0123}
        if why is not None:
            kept = {"why": why, "ms_after": 123.456}
        found.append(Decision(name, "MatMul", (2048, 9216), ms_before=123.456, **kept))
    return tuple(found)


def report(analysis: bool) -> Report:
    status = "unchanged" if analysis else "optimized"
    verdict = Verdict(
        status, "2 of 6 sites rewritten", Ratio(1.2, 1.1, 1.3), 0.001, 0.01, "user", 16, "cpu", "float32", 0.002
    )
    facts = ModelFacts("a/rather/long/path/to/" + "deep/" * 20 + "thin.onnx", "0" * 64, 10**6, 10**5, 10**7)
    stats = {"p50_ms": 0.1374, "runs": 9}
    known = decisions()
    return Report(
        verdict=verdict,
        before=facts,
        after=facts,
        plan=Plan("0" * 64, known, 0.01, "cpu", 1, 0, 16),
        kept=(Keep("n", "If", Why.SUBGRAPH),) * 3,
        frontier=(),
        latency=(Latency({}, "thread", 1, stats, {**stats, "p50_ms": 0.1131}, Ratio(1.2, 1, 1.3), Ratio(1, 1, 1)),),
        staircases={"MatMul 64x64 float32": {"dense": 0.0361, "svd 8": 0.0124, "svd 16": 0.0181}},
        seconds={},
        command=COMMAND,
        warnings=("the loss was measured on few samples [16], and this sentence is longer than eighty characters are",),
        additivity={"before_ms": 0.1412, "predicted_ms": 0.1103, "measured_ms": 0.1151},
        evidence={d.node: Evidence(192, 128, 5.2) for d in known},
    )


def shown(width: int, analysis: bool, **more: Any) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True, highlight=False, markup=False)
    terminal.show_report(report(analysis), quiet=False, analysis=analysis, console=console, **more)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 119, 120, 200])
@pytest.mark.parametrize("analysis", [True, False])
def test_a_site_is_a_line_or_two(width: int, analysis: bool) -> None:
    lines = shown(width, analysis)
    head = next(i for i, line in enumerate(lines) if line.startswith("site"))
    start = head + 1 + (lines[head + 1].strip() == "rank")  # a head may be broken at its space
    end = next(i for i, line in enumerate(lines) if line.startswith("  ") and i > start)
    assert all(len(line) <= width for line in lines[start:end])
    assert end - start <= {80: 12, 200: 6}.get(width, 8)
    rows = [line for line in lines[start:end] if "2048×9216" in line]
    assert len(rows) == 6
    assert sum("conv_svd 256x128" in row and "123.456 → 112.345" in row for row in rows) == 2
    assert [row for row in rows if " dense" in row] == [row for row in rows if "conv_svd" not in row]
    assert [row.partition("/")[0] for row in sorted(rows)] == [f"layer.{i}" for i in range(6)]
    assert any("[dense]" in row for row in rows) or width == 80, "names are no markup"
    assert ("effective" in "".join(lines)) is (analysis and width >= 120)


def test_short_reasons_are_spelled_out_below() -> None:
    narrow, wide = "\n".join(shown(80, True)), "\n".join(shown(200, True))
    for why in (Why.NOT_FASTER, Why.LOSS, Why.GIVEN_BACK, Why.SPARSE):
        assert wide.count(f"dense: {why.value}") == 1
        assert narrow.count(f": {why.value}") == 1
    assert "dense: none faster  " in narrow
    assert "dense: too much loss  " in narrow
    assert "  1 site dense: given back, so" in narrow
    assert "1 site dense, none faster: no rank was measured faster than the dense weight" in narrow


@pytest.mark.parametrize("analysis", [True, False])
def test_sentences_stay_on_their_line_and_the_command_is_last(analysis: bool) -> None:
    lines = shown(80, analysis)
    assert lines[-1] == f"again: {COMMAND}"
    assert f"warning: {report(analysis).warnings[0]}" in lines
    if analysis:
        assert lines[-2].endswith(
            "within loss 0.01: 0.1412 ms would become 0.1103 ms as predicted from the sites, 0.1151 ms as measured."
        )
        assert "  svd 8:0.0124 16:0.0181" in lines
    else:
        assert report(analysis).verdict.sentence() in lines
        assert lines[-2] == f"wrote {report(analysis).after.path}"
    assert any(line.split()[-3:] == ["0.1131", "ms", "1.20×"] for line in lines)


def test_quiet_says_the_verdict_alone() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    terminal.show_report(report(False), quiet=True, analysis=False, console=console)
    assert COMMAND not in console.export_text()


def test_names_give_way_and_are_cut_once() -> None:
    columns = [Column("model", numeric=False), Column("what it is", numeric=False), Column("95 % interval")]
    rows = [["a" * 40 + "z", "short", "1.234–1.345"], ["b", "c" * 30, "1"]]
    console = Console(width=50, file=io.StringIO(), record=True)
    console.print(grids.grid(columns, rows, 50, (0, 1)))
    lines = console.export_text().splitlines()
    assert len(lines) == 4, "a head of two lines, and a line for each row"
    assert all(len(line.rstrip()) <= 50 for line in lines)
    assert lines[2].count("…") == 1
    assert lines[2].split()[0].startswith("aaa")
    assert lines[2].split()[0].endswith("aaz")
    assert figures.middle("abcdefghij", 5) == "ab…ij"
    assert figures.middle("abcde", 5) == "abcde"


def comparison(name: str) -> dict[str, Any]:
    side = {"p50_ms": 1.5, "p90_ms": 2.0, "per_second": 600.0, "runs": 70}
    entry = {
        "shape": {"x": [1, 3, 224, 224]}, "provider": "cpu", "clock": "thread", "threads": 1, "before": side,
        "after": side, "ratio": 1.01, "ratio_ci": [1.0, 1.02], "aa_ratio": 1.0, "aa_ratio_ci": [0.99, 1.01],
    }  # fmt: skip
    files = [f"{name}-baseline-float32.onnx", f"{name}-low-rank-float32.onnx"]
    fact: dict[str, Any] = {"bytes": 10**7, "parameters": 10**6, "loss": 0.001, "error": None, "latencies": []}
    short = files[1].rpartition("/")[2]
    return {
        "models": [{**fact, "path": path, "latency": entry if i else None} for i, path in enumerate(files)],
        "accuracy": [{"model": short, "output": "a_rather_long/output/name:0", "tolerance_abs": 0.1, "cosine": 1.0}],
        "change": {
            "against": "old.json",
            "rows": [
                {"model": short, "timed_with": "1 thread, CPU time, x 1×3×224×224", "what": "p50 ms", "before": 1.5,
                 "now": 1.6, "worse_by": 0.0667, "judged": "worse"}
            ],
        },
    }  # fmt: skip


@pytest.mark.parametrize("width", [80, 200])
def test_a_comparison_has_a_line_for_each_model(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True, highlight=False, markup=False)
    sidebyside.show(comparison("ocr/recogniser-with-a-long-name"), console=console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    tables = [line for line in lines if line.startswith("recogniser") and " faster" not in line]
    assert len(tables) == 4, "two of latency, one of outputs, one of change"
    assert all(len(line) <= width for line in tables)
    assert all(line.split("  ")[0].count("…") <= 1 for line in tables)
    if width == 200:
        assert all(line.startswith("recogniser-with-a-long-name-") for line in tables)


def test_a_sweep_says_its_warnings_once_with_their_limits(capsys: pytest.CaptureFixture[str]) -> None:
    first = report(False)
    both = (*first.warnings, "of both")
    stricter = dataclasses.replace(first.verdict, loss_limit=0.002)
    one, other = (
        dataclasses.replace(first, warnings=both),
        dataclasses.replace(first, verdict=stricter, warnings=("of both",)),
    )
    terminal.show_sweep((one, other))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [f"warning at {first.verdict.loss_limit:g}: {first.warnings[0]}", "warning: of both"]
