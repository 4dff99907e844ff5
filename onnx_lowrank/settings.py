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
from onnx_lowrank.providers import NVIDIA, PROVIDERS, Provider, checked_options

DEFAULT_KINDS = ("svd", "conv_svd", "spatial", "asym3d", "tucker", "pivot", "nystrom", "shared")
KIND_NAMES = (*DEFAULT_KINDS, "branch2", "branch4", "branch8")
POLICY_NAMES = ("knapsack", "uniform", "energy", "welore", "vbmf", "greedy", "staircase", "flops")
METRIC_NAMES = ("relative", "cosine", "top1", "kl")
PRECISION_NAMES = ("fp32", "fp16", "int8")
DEFAULT_LIMIT = 0.01
DEFAULT_CONFIDENCE = 0.95


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
        max_loss: goal: the fastest model within this relative squared error of the outputs, on held-out samples.
            0.01 when no goal is given.
        speedup: goal: the least loss at this measured ratio.
        size: goal: the least loss at this fraction of the weight bytes.
        metric: what the loss is: `relative`, `cosine`, `top1`, `kl`, or `file.py:function`.
        max_drop: the limit for a metric other than `relative`.
        confidence: how sure the limit must hold on samples like the held-out ones; 0.5 takes their loss as it is. None
            is 0.95, or 0.5 where a single sample can be held out.
        output_weights: weight of an output in the loss, by name; 1 where none is given.
        require_speedup: fail (exit 3) unless the lower end of the measured interval reaches this ratio.
        provider: execution provider that will run the model, `cpu`, `cuda`, `tensorrt`, …
        provider_options: passed to the provider; latency tables belong to them too.
        cpu_fallback: False refuses models with nodes that the provider leaves to the CPU.
        verify_latency: False plans for a machine that is not here, with a table that was measured there: everything
            runs on the CPU, nothing is timed, and the latency in the verdict is predicted.
        threads: intra-op threads of every timing; one is stable and comparable.
        precision: what will be deployed, `fp32`, `fp16` or `int8`; None is the model's own.
        streams: above 1, throughput is also measured with so many threads that run at the same time.
        policy: how ranks are chosen; all but `knapsack` are baselines from the literature, for comparison.
        refit: repair the factors with data after the ranks are chosen.
        merge: first take constants by channel into convolutions and multiply neighbouring maps: exact, and faster.
        kinds: ways to rewrite a site that may be used.
        include, exclude: globs on node names.
        samples: at most so many samples are read from the data.
        shapes: shapes by input name, of synthetic inputs and of every timing; several sets count equally.
        seed: of every random choice.
        inline_functions: put the bodies of model-local functions in the place of their calls first.
        provenance: whether new nodes say in their metadata (`onnx_lowrank.*`) where they come from.
        cache: folder of the measured latency tables.
        resume: folder that keeps finished stages, so that a run that was cut off goes on from the last one.

    Raises:
        SettingsError: a value that cannot be used.
    """

    max_loss: float | None = None
    speedup: float | None = None
    size: float | None = None
    metric: str = "relative"
    max_drop: float | None = None
    confidence: float | None = None
    output_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    require_speedup: float | None = None
    provider: str = "cpu"
    provider_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cpu_fallback: bool = True
    verify_latency: bool = True
    threads: int = 1
    precision: str | None = None
    streams: int = 1
    policy: str = "knapsack"
    refit: bool = True
    merge: bool = True
    kinds: tuple[str, ...] = DEFAULT_KINDS
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 256
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    seed: int = 0
    cache: Path = dataclasses.field(default_factory=default_cache)
    resume: Path | None = None
    inline_functions: bool = False
    provenance: bool = True

    def __post_init__(self) -> None:
        for name in ("cache", "resume"):  # from Python they may come as text
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        self._check_goal()
        self._check_metric()
        self._check_provider()
        if self.threads < 1:
            raise SettingsError(f"threads is {self.threads}; give 1 or more")
        if not 1 <= self.streams <= 256:
            raise SettingsError(f"streams is {self.streams}; give 1 to 256")
        if self.samples < 1:
            raise SettingsError(f"samples is {self.samples}; give 1 or more")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; give 0 or more")
        for kind in self.kinds:
            if kind not in KIND_NAMES:
                raise SettingsError(f"no kind is called '{kind}'{suggestion(kind, KIND_NAMES)}")
        if not self.kinds:
            raise SettingsError(f"no kind is allowed; give some of {', '.join(KIND_NAMES)}")
        if self.precision is not None and self.precision not in PRECISION_NAMES:
            raise SettingsError(
                f"no precision is called '{self.precision}'{suggestion(self.precision, PRECISION_NAMES)}"
            )
        if self.precision == "int8" and not self.verify_latency:
            raise SettingsError("precision int8 is chosen by timing here; give fp16 or none, or verify_latency")
        if self.policy not in POLICY_NAMES:
            raise SettingsError(f"no policy is called '{self.policy}'{suggestion(self.policy, POLICY_NAMES)}")

    def _check_goal(self) -> None:
        for name in ("max_loss", "size"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 < value < 1):
                raise SettingsError(f"{name} is {value}; give a number between 0 and 1, for example 0.01")
        for name, least in (("speedup", 1.0), ("require_speedup", 1.0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise SettingsError(f"{name} is {value}; give a ratio of at least 1, such as 1.1")
        goals = [name for name in ("max_loss", "max_drop", "speedup", "size") if getattr(self, name) is not None]
        if len(goals) > 1:
            raise SettingsError(f"{goals[0]} and {goals[1]} are two goals; give one of them")
        if self.size is not None and self.policy != "knapsack":
            raise SettingsError(f"size is a goal of policy knapsack only, not of '{self.policy}'")

    def _check_provider(self) -> None:
        """Makes `provider` carry its options, so that a session takes them wherever the name goes."""
        options = checked_options(self.provider_options)
        if not self.verify_latency:
            if self.provider not in (*PROVIDERS, *PROVIDERS.values()):
                raise SettingsError(
                    f"no execution provider is called '{self.provider}'{suggestion(self.provider, PROVIDERS)}"
                )
            for name in ("speedup", "require_speedup"):
                if (getattr(self, name) or 1.0) > 1:
                    raise SettingsError(f"{name} is measured; without verify_latency give another goal, or a size")
        engines = None if self.cache.is_file() else self.cache / "tensorrt"
        provider = Provider(
            str(self.provider), options, fallback=self.cpu_fallback, here=self.verify_latency, folder=engines
        )
        if options and provider.short == "cpu":
            raise SettingsError(
                f"provider cpu takes no options, '{next(iter(options))}' was given; name another provider"
            )
        if not self.cpu_fallback and provider.short not in NVIDIA:
            raise SettingsError(f"cpu_fallback says nothing for provider '{self.provider}'; give cuda or tensorrt")
        object.__setattr__(self, "provider_options", options)
        object.__setattr__(self, "provider", provider)

    def _check_metric(self) -> None:
        own = self.metric in METRIC_NAMES or self.metric.rpartition(":")[0].endswith(".py")
        if not own:
            raise SettingsError(f"no metric is called '{self.metric}'{suggestion(self.metric, METRIC_NAMES)}")
        if self.max_drop is not None and not (math.isfinite(self.max_drop) and self.max_drop > 0):
            raise SettingsError(f"max_drop is {self.max_drop}; give a positive number, for example 0.01")
        if (self.metric == "relative") != (self.max_drop is None) and self.max_drop is not None:
            raise SettingsError("max_drop is the limit for --metric; give max_loss for the relative error")
        if not 0.5 <= self.sure < 1:
            raise SettingsError(f"confidence is {self.confidence}; give 0.5 or more and less than 1, for example 0.95")
        if self.metric != "relative" and self.max_loss is not None:
            raise SettingsError(f"max_loss is the limit of the relative error; give max_drop for metric {self.metric}")
        if bad := [name for name, weight in self.output_weights.items() if not (math.isfinite(weight) and weight >= 0)]:
            raise SettingsError(f"the weight of output '{bad[0]}' is not a number of at least 0")

    @property
    def sure(self) -> float:
        """The confidence that the limit is held with."""
        return DEFAULT_CONFIDENCE if self.confidence is None else self.confidence

    @property
    def limit(self) -> float:
        """Largest allowed loss in units of the metric; infinite when the goal is a speed or a size."""
        if self.speedup is not None or self.size is not None:
            return math.inf
        given = self.max_loss if self.metric == "relative" else self.max_drop
        return DEFAULT_LIMIT if given is None else given

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
