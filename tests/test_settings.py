"""Settings are checked where they are made, and a typo gets a suggestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.settings import Settings


def test_an_unknown_setting_gets_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="no setting is called 'max_los'; did you mean 'max_loss'"):
        Settings.from_table({"max_los": 0.1})


def test_folders_may_be_text(tmp_path: Path) -> None:
    found = Settings.from_table({"cache": str(tmp_path / "cache"), "resume": str(tmp_path / "kept")})
    assert (found.cache, found.resume) == (tmp_path / "cache", tmp_path / "kept")
    assert found == Settings(cache=tmp_path / "cache", resume=tmp_path / "kept")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"max_loss": 0.0}, "max_loss is 0"),
        ({"max_loss": float("nan")}, "max_loss is nan"),
        ({"max_loss": 2.0}, "between 0 and 1"),
        ({"require_speedup": 0.5}, "require_speedup is 0.5"),
        ({"threads": 0}, "threads is 0"),
        ({"confidence": 0.4}, "confidence is 0.4"),
        ({"confidence": 1.0}, "less than 1"),
        ({"samples": 0}, "samples is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"kinds": ("svdd",)}, "did you mean 'svd'"),
        ({"kinds": ()}, "no kind is allowed"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_table(table)


def test_a_precision_needs_a_machine_that_can_be_timed() -> None:
    with pytest.raises(SettingsError, match="precision int8 is chosen by timing here"):
        Settings(precision="int8", verify_latency=False)
