"""The table of four models: every figure stands in the JSON, and it is absent where no precision was made."""

from __future__ import annotations

from typing import Any

from onnx_lowrank.fourways import precisions
from onnx_lowrank.markdown import markdown
from onnx_lowrank.scheme import Scheme


def column(name: str, ms: float, ratio: float | None, over: float | None) -> dict[str, Any]:
    ends = [None if r is None else [r - 0.1, r + 0.1] for r in (ratio, over)]
    return {
        "name": name, "bytes": 2_000_000, "loss": 0.0125, "p50_ms": ms,
        "ratio": ratio, "ratio_ci": ends[0], "over_precision": over, "over_precision_ci": ends[1],
    }  # fmt: skip


FOUR = [
    column("original", 80.0, None, 0.25),
    column("int8 alone", 20.0, 4.0, None),
    column("low rank alone", 40.0, 2.0, 0.5),
    column("low rank and int8", 10.0, 8.0, 2.0),
]


def test_every_model_has_its_column() -> None:
    table = precisions({"precisions": FOUR})
    assert table is not None
    assert [c.name for c in table.columns] == ["", *(row["name"] for row in FOUR)]
    cells = {row[0].text: [c.text for c in row[1:]] for row in table.rows}
    assert cells["latency p50, ms"] == ["80.00", "20.00", "40.00", "10.00"]
    assert cells["speed-up"] == ["–", "4.00× (3.90–4.10)", "2.00× (1.90–2.10)", "8.00× (7.90–8.10)"]
    assert cells["against int8 alone"][1:] == ["–", "0.50× (0.40–0.60)", "2.00× (1.90–2.10)"]
    assert cells["file"] == ["2.00 MB"] * 4
    assert cells["loss"] == ["0.01250"] * 4


def test_there_is_no_table_without_a_precision() -> None:
    assert precisions({}) is None
    assert precisions({"precisions": []}) is None


def test_markdown_shows_them() -> None:
    report: dict[str, Any] = {"precisions": FOUR, "status": "optimized", "verdict": {"precision": "int8 (static)"}}
    text = markdown(report)
    assert "| speed-up | – | 4.00× (3.90–4.10) |" in text
    assert "faster in int8" in text


def test_a_scheme_says_what_times_depend_on() -> None:
    schemes = [
        Scheme("fp16"),
        Scheme("int8", "dynamic"),
        Scheme("int8", "static", "extremes"),
        Scheme("int8", "static", "extremes", linear_only=True),
    ]
    assert len({scheme.label for scheme in schemes}) == len(schemes)
    excluding = Scheme("int8", "static", "clipped", biases=True, exclude=("a", "b"))
    assert excluding.label == schemes[2].label
    assert excluding.words() == "int8 (static, 2 nodes in float)"
    assert Scheme.from_table(None) is None
