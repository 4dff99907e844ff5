"""What the user asks for, in one frozen value that is checked where it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import SettingsError

KIND_NAMES = ("svd", "conv_svd", "pivot")


def default_cache() -> Path:
    """Folder of measured latency tables: `$ONNX_LOWRANK_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("ONNX_LOWRANK_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnx-lowrank"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of a run. CLI and Python share the names: `--max-loss` is `max_loss`.

    Args:
        max_loss: largest allowed relative squared error of the outputs on held-out samples.
        require_speedup: fail (exit 3) unless the lower end of the measured interval reaches this ratio.
        provider: execution provider that will run the model, `cpu`, `cuda`, `tensorrt`, …
        threads: intra-op threads of every timing; one is stable and comparable.
        kinds: ways to rewrite a site that may be used.
        include, exclude: globs on node names.
        samples: at most so many samples are read from the data.
        shapes: shapes of synthetic inputs, by input name.
        seed: of every random choice.
        cache: folder of the measured latency tables.

    Raises:
        SettingsError: a value that cannot be used.
    """

    max_loss: float = 0.01
    require_speedup: float | None = None
    provider: str = "cpu"
    threads: int = 1
    kinds: tuple[str, ...] = KIND_NAMES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 256
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    cache: Path = dataclasses.field(default_factory=default_cache)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_loss) and 0 < self.max_loss < 1):
            raise SettingsError(f"max_loss is {self.max_loss}; give a number between 0 and 1, for example 0.01")
        if self.require_speedup is not None and not (math.isfinite(self.require_speedup) and self.require_speedup >= 1):
            raise SettingsError(f"require_speedup is {self.require_speedup}; give a ratio of at least 1, such as 1.1")
        if self.threads < 1:
            raise SettingsError(f"threads is {self.threads}; give 1 or more")
        if self.samples < 1:
            raise SettingsError(f"samples is {self.samples}; give 1 or more")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; give 0 or more")
        for kind in self.kinds:
            if kind not in KIND_NAMES:
                raise SettingsError(f"no kind is called '{kind}'{suggestion(kind, KIND_NAMES)}")
        if not self.kinds:
            raise SettingsError(f"no kind is allowed; give some of {', '.join(KIND_NAMES)}")

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Settings:
        """Settings out of keyword arguments; an unknown name is refused with a suggestion.

        Raises:
            SettingsError: an unknown name, or a value that cannot be used.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in table:
            if name not in names:
                raise SettingsError(f"no setting is called '{name}'{suggestion(name, names)}")
        return cls(**table)


def suggestion(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `words`, else the list of them."""
    known = list(words)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there is {', '.join(known)}"
