"""Predicted and measured times of the whole model, and losses that are not linear: in words, in both reports."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from onnx_lowrank.estimates import estimates
from onnx_lowrank.html import html
from onnx_lowrank.markdown import markdown

if TYPE_CHECKING:
    from tests.conftest import Written

TIMES = {"before_ms": 490.2, "predicted_ms": 150.0, "measured_ms": 145.0, "corrected_sites": 17}
PROBES = {"sites": 12, "checked": 9, "runs": 60, "samples": 3, "not_linear": ["a", "b"]}
REPORTS = [html, markdown]


def test_predicted_and_measured_stand_side_by_side() -> None:
    assert estimates({"additivity": TIMES}) == [
        "Whole model: 490.2 ms before, 150.0 ms predicted from the times of its sites, 145.0 ms measured when built: "
        "the prediction is 3.4 % too long, and the runtime's profile corrected the times of 17 sites."
    ]


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({"predicted_ms": 130.5}, "10.0 % too short, and the runtime's profile corrected the times of 17 sites."),
        ({"corrected_sites": 1}, "too long, and the runtime's profile corrected the times of 1 site."),
        ({"corrected_sites": 0}, "too long, and the runtime's profile corrected no site's time."),
        ({"corrected_sites": None}, "3.4 % too long."),
    ],
)
def test_the_difference_has_a_side_and_corrected_sites_are_counted(changed: dict[str, Any], end: str) -> None:
    (said,) = estimates({"additivity": {**TIMES, **changed}})
    assert said.endswith(end)


@pytest.mark.parametrize("additivity", [{}, None, {**TIMES, "measured_ms": None}, {**TIMES, "measured_ms": 0.0}])
@pytest.mark.parametrize("probes", [{}, None, {**PROBES, "not_linear": []}])
def test_nothing_is_said_of_what_was_not_found(additivity: Any, probes: Any) -> None:
    assert estimates({"additivity": additivity, "probes": probes}) == []


def test_sites_with_losses_that_are_not_linear_are_counted() -> None:
    (said,) = estimates({"probes": PROBES})
    assert said.startswith("At 2 of the 9 sites that were probed at two ranks or more, the loss is not linear")
    (older,) = estimates({"probes": {"not_linear": ["a", "b"]}})
    assert older.startswith("At 2 sites that were probed")


@pytest.mark.parametrize("made", REPORTS)
def test_both_reports_say_them_below_the_sites(written: dict[str, Written], made: Any) -> None:
    text = made({**written["optimize"].data, "additivity": TIMES, "probes": PROBES})
    below = re.split("<h2>Rank staircases</h2>|### Sites", text)[1]
    said, _, _ = re.split("<h2>Accuracy</h2>|### Outputs", below)[0].partition("</section>")
    assert "150.0 ms predicted from the times of its sites, 145.0 ms measured when built" in said
    assert "3.4 % too long" in said
    assert "the times of 17 sites." in said
    assert "At 2 of the 9 sites" in said


@pytest.mark.parametrize("made", REPORTS)
def test_both_reports_of_a_run_say_its_own_figures(written: dict[str, Written], made: Any) -> None:
    data = written["optimize"].data
    found = data["additivity"]
    said = re.search(r"([\d.]+) ms before, ([\d.]+) ms predicted from .*?, ([\d.]+) ms measured", made(data))
    assert said
    wanted = [found[f"{key}_ms"] for key in ("before", "predicted", "measured")]
    (decimals,) = {len(ms.partition(".")[2]) for ms in said.groups()}
    assert decimals > 0
    assert [float(ms) for ms in said.groups()] == pytest.approx(wanted, rel=0, abs=0.51 * 10**-decimals)


@pytest.mark.parametrize("made", REPORTS)
def test_reports_that_lack_them_say_nothing(written: dict[str, Written], made: Any) -> None:
    data = {**written["optimize"].data, "additivity": {}, "probes": {}}
    del (older := {**data})["additivity"], older["probes"]
    for text in map(made, (data, older, written["compare"].data)):
        assert not re.search("predicted from the times|Predicted and measured|not linear", text)
