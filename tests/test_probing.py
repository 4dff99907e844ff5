"""What probing costs is said before it starts, and a person at a terminal reads it."""

from __future__ import annotations

import pytest

from onnx_lowrank.probing import cost_of
from onnx_lowrank.run import Clock
from onnx_lowrank.terminal import progress


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1e-5, "about 1 s"), (0.1, "about 11 s"), (0.5, "about 56 s"), (1.0, "about 2 min"), (20.0, "about 37 min")],
)
def test_the_cost_is_the_number_of_runs_and_their_expected_time(seconds: float, words: str) -> None:
    assert cost_of(37, 3, seconds) == f"up to 111 runs on 3 samples, {words}"


def test_a_cost_follows_the_name_of_its_stage_and_is_no_stage_of_its_own() -> None:
    seen: list[tuple[str, int, int]] = []
    clock = Clock(lambda *step: seen.append(step))
    clock("probe", 0, 2, "up to 6 runs")
    clock("probe", 1, 2, "up to 6 runs")
    clock("decide", 0, 1)
    assert seen == [("probe: up to 6 runs", 0, 2), ("probe: up to 6 runs", 1, 2), ("decide", 0, 1)]
    assert list(clock.seconds) == ["probe"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_of_80_columns_shows_it_whole_and_a_pipe_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(hidden=False) as tick:
        tick("measure", 3, 3)
        tick("probe: up to 111 runs on 3 samples, about 2 min", 1, 26)
    shown = capsys.readouterr().err
    for text in ("measure ranks", "probe sensitivities", "up to 111 runs on 3 samples, about 2 min", "1/26"):
        assert (text in shown) is terminal
