"""The gate of `compare --baseline`: what is judged, what is not and says so, what fails. All timings are given."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onnx_lowrank import regressions, sidebyside, verdicts
from onnx_lowrank.errors import RequirementError
from onnx_lowrank.html import html
from onnx_lowrank.markdown import markdown

Json = dict[str, Any]
BASE = ("ref.onnx", "new.onnx")


def entry(ratio: float = 1.0, p50: float = 4.0, **way: Any) -> Json:
    """A latency entry: the baseline takes `p50` ms, the other model that over `ratio`."""
    known = {"provider": "cpu", "threads": 1, "clock": "thread", "shape": {"x": [1, 4]}, **way}
    sides = {"before": {"p50_ms": p50}, "after": {"p50_ms": p50 / ratio}}
    return {**known, **sides, "ratio": ratio, "ratio_ci": [ratio * 0.99, ratio * 1.01], "aa_ratio_ci": [0.99, 1.01]}


def report(*entries: Json | None, names: tuple[str, ...] = BASE, loss: float = 0.01, **more: Any) -> Json:
    """A comparison with the first name as baseline, and all others timed by these entries."""
    models = [{"path": names[0], "sha256": "0", "loss": 0.0, "latency": None, "latencies": [None] * len(entries[1:])}]
    for name in names[1:]:
        models.append({"path": name, "loss": loss, "latency": entries[0], "latencies": list(entries[1:])})
    facts = {"data": "user", "samples": 8, "provider": "cpu", "threads": 1, "metric": "relative"}
    found = {"schema": 1, "models": models, "baseline": 0, **facts, "sample_fingerprint": {"sha256": "a", "count": 8}}
    return copy.deepcopy({**found, **more})


def change(now: Json, old: Json) -> Json:
    return regressions.change(now, old, against="runs/old.json", limit=0.05)


def judged(found: Json, what: str, model: str = "new.onnx") -> list[tuple[str, str]]:
    return [(r["timed_with"], r["judged"]) for r in found["rows"] if (r["what"], r["model"]) == (what, model)]


def failing(found: Json) -> str:
    with pytest.raises(RequirementError) as fault:
        regressions.require(found)
    return str(fault.value)


def test_a_way_is_found_among_others_and_the_others_are_warned_of() -> None:
    old = report(entry(1.5))
    now = report(entry(1.2), entry(1.4, threads=2, clock="wall"), entry(1.4, shape={"x": [8, 4]}))
    found = change(now, old)
    assert [said for _, said in judged(found, "speed-up")] == ["worse"]
    assert found["warnings"] == [
        "cpu, 2 threads, wall time, x 1×4: not timed so in runs/old.json, and not judged",
        "cpu, 1 thread, CPU time, x 8×4: not timed so in runs/old.json, and not judged",
    ]
    back = change(old, now)
    assert [said for _, said in judged(back, "speed-up")] == ["held"]
    assert "cpu, 2 threads, wall time, x 1×4: timed so in runs/old.json, and not now" in back["warnings"]


def test_a_provider_with_other_options_is_another_way() -> None:
    old = report(entry(1.5, provider="cuda", provider_options={"use_tf32": "0"}))
    same = report(entry(1.2, provider="CUDAExecutionProvider", provider_options={"use_tf32": "0"}))
    assert [said for _, said in judged(change(same, old), "speed-up")] == ["worse"]
    for now in (entry(1.2, provider="cuda", provider_options={}), entry(1.2, provider="cuda")):
        found = change(report(now), old)
        assert judged(found, "speed-up") == []
        assert any("cuda (use_tf32=0), 1 thread" in w and "not now" in w for w in found["warnings"])


def test_where_nothing_is_judged_that_is_said() -> None:
    found = change(report(entry(shape={"x": [2, 4]}), sample_fingerprint={"sha256": "b", "count": 8}), report(entry()))
    regressions.require(found)
    assert "nothing was judged against runs/old.json" in found["warnings"]


def test_a_model_that_is_gone_or_new_is_named() -> None:
    old, now = report(entry(), names=(*BASE, "third.onnx")), report(entry(), names=(*BASE, "fourth.onnx"))
    found = change(now, old)
    regressions.require(found)
    assert judged(found, "model", "third.onnx") == [("", "not compared")]
    assert any(w.startswith("third.onnx is in runs/old.json, but not among the models now") for w in found["warnings"])
    assert any(w.startswith("fourth.onnx is not in runs/old.json") for w in found["warnings"])


def test_a_model_that_cannot_be_timed_any_more_fails() -> None:
    old, now = (report(entry(), names=(*BASE, "third.onnx")) for _ in range(2))
    now["models"][2]["latency"] = None
    found = change(now, old)
    assert judged(found, "p50 ms", "third.onnx") == [("1 thread, CPU time", "failed")]
    assert failing(found) == "worse than runs/old.json: third.onnx could not be timed (1 thread, CPU time)"
    assert "third.onnx was not timed with cpu, 1 thread" in " ".join(change(old, now)["warnings"])


def test_a_way_that_was_asked_for_and_refused_fails() -> None:
    old = report(entry(), entry(threads=2, clock="wall"))
    refused = {"provider": "cpu", "provider_options": {}, "threads": 2, "shape": {"x": [1, 4]}}
    assert failing(change(report(entry(), untimed=[refused]), old)) == (
        "worse than runs/old.json: ref.onnx could not be timed (cpu, 2 threads, wall time, x 1×4); "
        "new.onnx could not be timed (cpu, 2 threads, wall time, x 1×4)"
    )
    regressions.require(change(report(entry()), old))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sample_fingerprint": {"sha256": "b", "count": 9}}, "has other samples (9, now 8)"),
        ({"sample_fingerprint": {"sha256": "b", "count": 8}}, "has other samples (8, now 8)"),
        ({"sample_fingerprint": None}, "does not tell which samples"),
        ({"metric": "kl"}, "another metric: kl, now relative"),
        ({"data": "synthetic"}, "another data: synthetic, now user"),
        ({"names": ("other.onnx", "new.onnx")}, "compares with other.onnx, now ref.onnx"),
    ],
)
def test_losses_of_other_samples_are_not_judged(more: Json, says: str) -> None:
    old = report(entry(), **more)
    found = change(report(entry(), loss=0.5), old)
    assert judged(found, "loss") == [("", "not judged")]
    (warning,) = (w for w in found["warnings"] if w.startswith("losses are not judged: runs/old.json"))
    assert says in warning
    regressions.require(found)
    assert "loss of new.onnx 0.01000 → 0.5000" in failing(change(report(entry(), loss=0.5), report(entry())))


def test_a_loss_over_a_part_of_the_samples_is_not_judged() -> None:
    old, now = report(entry()), report(entry(), loss=0.5)
    old["models"][1]["sample_losses"], now["models"][1]["sample_losses"] = [0.01] * 4, [0.5] * 8
    found = change(now, old)
    assert judged(found, "loss") == [("", "not judged")]
    assert any(w.startswith("the loss of new.onnx is not judged") for w in found["warnings"])


def broken(names: tuple[str, ...] = (*BASE, "third.onnx")) -> Json:
    """A comparison whose last model does not load."""
    now = report(entry(), names=names)
    now["models"][-1] |= {"error": "no such operator", "latency": None, "loss": None}
    return now


def test_a_model_that_does_not_load_any_more_fails_with_its_error() -> None:
    old = report(entry(), names=(*BASE, "third.onnx"))
    assert failing(change(broken(), old)) == (
        "worse than runs/old.json: third.onnx could not be compared: no such operator"
    )
    assert judged(change(broken(), old), "model", "third.onnx") == [("", "failed")]
    assert judged(change(broken(), broken()), "model", "third.onnx") == [("", "not compared")]
    regressions.require(change(broken(), broken()))
    assert "third.onnx could not be compared in runs/old.json" in " ".join(change(old, broken())["warnings"])


def terminal(data: Json) -> str:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=200, file=nowhere, record=True, highlight=False)
        sidebyside.show(data, console=console)
    return console.export_text(styles=True)


def test_the_verdict_says_what_is_worse() -> None:
    now, old = report(entry(), loss=0.5), report(entry(1.5))
    data = now | {"change": change(now, old)}
    found = verdicts.verdict(data)
    headline = "Worse than old.json: speed-up of new.onnx (1 thread, CPU time) 1.500 → 1.000, and 1 more"
    assert (found.tone, found.headline) == ("bad", headline)
    assert found.figures.startswith("No speed difference shown · new.onnx: 1.00×")
    assert f"<h1>{headline}</h1>" in html(data)
    assert 'class="tone-bad"' in html(data)
    assert "Worse than old.json" in markdown(data).splitlines()[0]
    (line,) = (line for line in terminal(data).splitlines() if headline in line)
    assert line.startswith("\x1b[1;31m")
    held = verdicts.verdict(now | {"change": change(now, now)})
    assert (held.tone, held.headline) == ("plain", "No speed difference shown")


def test_the_verdict_names_who_could_not_be_compared() -> None:
    now = broken()
    data = now | {"change": change(now, report(entry(), names=(*BASE, "third.onnx")))}
    assert verdicts.verdict(data).headline == "Worse than old.json: third.onnx could not be compared"
    assert "third.onnx could not be compared: no such operator" in terminal(data)


@pytest.mark.parametrize("ratio", [1.5, 1.0, 0.7])
def test_the_verdict_has_the_loss_and_the_shape(ratio: float) -> None:
    found = verdicts.verdict(report(entry(ratio)))
    assert found.figures.endswith("its outputs differ from those of ref.onnx by 0.010 (relative)")
    assert found.where.startswith("cpu, 1 thread, x 1×4 · ")
    several = verdicts.verdict(report(entry(ratio, shape={name: [2] for name in "abcde"}), entry(2.0, threads=2)))
    assert several.where.startswith("cpu, 1 thread, a 2, b 2, c 2, and 2 more, the first of 2 ways · ")
