"""Any ONNX models side by side: paired latency, outputs, cold starts and nodes, ours or not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import contest, details, measure, profiles
from onnx_lowrank.contest import Configuration, Contest, Entrant
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.hardware import card, left_out
from onnx_lowrank.labels import file_names
from onnx_lowrank.measure import Latency
from onnx_lowrank.providers import Provider
from onnx_lowrank.report import environment
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References


@dataclasses.dataclass(frozen=True)
class Row:
    """One model against the baseline: bytes, parameters, loss, paired latency (None for the baseline).

    `latencies` are those of the further configurations. A model that could not be compared has only its `error`.
    """

    path: str
    bytes: int | None
    parameters: int | None
    loss: float | None
    latency: Latency | None
    sha256: str | None = None
    error: str | None = None
    latencies: tuple[Latency | None, ...] = ()
    sample_losses: tuple[float | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        row: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["loss"] = details.finite([self.loss])[0] if self.loss is not None else None
        row["latency"] = self.latency.to_dict() if self.latency else None
        row["latencies"] = [entry.to_dict() if entry else None for entry in self.latencies]
        row["sample_losses"] = list(self.sample_losses)
        return row


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The models in the order given; `baseline` is the position of the one that the others are compared with.

    `untimed` are the ways of timing that were asked for and that the baseline, or this machine, did not accept;
    `fingerprint` is a hash of the samples.
    """

    rows: tuple[Row, ...]
    data: str
    samples: int
    provider: str
    threads: int
    metric: str = "relative"
    baseline: int = 0
    configurations: tuple[Configuration, ...] = ()
    untimed: tuple[Configuration, ...] = ()
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    command: str = ""
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Stable keys, schema 1."""
        return {
            "schema": 1,
            "models": [row.to_dict() for row in self.rows],
            "baseline": self.baseline,
            "configurations": [one.to_dict() for one in self.configurations],
            "untimed": [one.to_dict() for one in self.untimed],
            "sample_fingerprint": {"sha256": self.fingerprint, "count": self.samples},
            **{key: getattr(self, key) for key in ("data", "samples", "metric", "provider", "threads")},
            **self.parts,
            "environment": environment() | self.hardware,
            "command": self.command,
            "warnings": list(self.warnings),
        }


def compare(
    models: Sequence[str | Path],
    *,
    data: Any = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    command: str = "",
    brief: bool = False,
    **choices: Any,
) -> Comparison:
    """Time models turn about against the first that works, and measure how far their outputs are from its outputs.

    Args:
        models: two or more files with the same inputs.
        data: as for `optimize`; None is synthetic.
        brief: latency and loss only; no outputs one by one, cold starts and profiles.
        choices: fields of `Settings` (samples, shapes, seed, metric, streams); `provider` and `threads` may be several,
            each is timed with each.

    Raises:
        LowRankError: fewer than two models could be compared, or the data does not fit the first that loads.
    """
    warnings: list[str] = []
    wanted = _several(choices.pop("provider", "cpu"))
    providers = contest.usable(wanted, warnings)
    threads = _several(choices.pop("threads", 1))
    if not threads:
        raise SettingsError("compare needs a number of threads")
    several = [_settings(choices, provider, n) for provider in providers for n in threads]
    lacking = [_settings(choices, provider, n) for provider in wanted if provider not in providers for n in threads]
    settings, paths = several[0], [Path(m) for m in models]
    if len(paths) < 2:
        raise SettingsError("compare needs two models or more")
    progress("compare", 0, 4)
    entered = contest.enter(paths, data, settings, warnings)
    names = _labels(entered.entrants)
    tolerances: list[dict[str, Any]] = []
    contest.judge(
        entered, settings, lambda e, s, r: tolerances.extend(_outputs(entered, e, names, s, r) if not brief else ())
    )
    ways = contest.configurations([(one.provider, one.threads) for one in several], entered.feeds)
    timed = [way for way in _ticking(ways, progress) if contest.race(entered, way, settings, len(ways))]
    hardware = _hardware(entered, names, ways, timed)
    progress("compare", 3, 4)
    warnings += measure.cautions([entry for e in entered.running for entry in e.latencies if entry])
    parts = {} if brief else _parts(entered, names, settings, tolerances)
    progress("compare", 4, 4)
    ways += contest.configurations([(one.provider, one.threads) for one in lacking], entered.feeds)
    found = _comparison(entered, settings, timed, ways, parts)
    return dataclasses.replace(found, command=command, hardware=hardware)


def _settings(choices: dict[str, Any], provider: str, threads: int) -> Settings:
    """Settings of one way of timing; options of a provider are not for the CPU beside it."""
    own = {k: v for k, v in choices.items() if k != "provider_options" or provider != "cpu"}
    return Settings.from_table({**own, "provider": provider, "threads": threads})


def _several(given: Any) -> list[Any]:
    return list(dict.fromkeys(given)) if isinstance(given, list | tuple) else [given]


def _ticking(ways: Sequence[Configuration], progress: Callable[[str, int, int], None]) -> Any:
    for done, way in enumerate(ways):
        progress("race", done, len(ways))
        yield way
    progress("race", len(ways), len(ways))


def _labels(entrants: Sequence[Entrant]) -> dict[int, str]:
    """Names by identity."""
    return {id(e): name for e, name in zip(entrants, file_names([str(e.path) for e in entrants]), strict=True)}


def _outputs(
    entered: Contest, entrant: Entrant, names: dict[int, str], session: Any, references: References
) -> list[dict[str, Any]]:
    if entrant is entered.first:
        return []
    return details.outputs(names[id(entrant)], references, session)


def _hardware(
    entered: Contest, names: dict[int, str], ways: Sequence[Configuration], timed: Sequence[Configuration]
) -> dict[str, Any]:
    """The card now, and the nodes of every model that were left to the CPU in a way that it was timed in."""
    found: dict[str, Any] = next((facts for way in timed if (facts := card(way.provider))), {})
    if all(Provider.of(way.provider).short == "cpu" for way in timed):
        return found
    attempt, rows = details.attempting(entered.warnings), []
    for entrant in entered.running:
        own = [way for way, entry in zip(ways, entrant.latencies, strict=True) if entry or entrant is entered.first]
        own = [way for way in own if way in timed]
        ran = [(way.provider, way.threads, way.feed) for way in own]
        rows += left_out(names[id(entrant)], entrant.path, ran, attempt, entered.warnings)
    return {**found, "fallback": rows}


def _parts(
    entered: Contest, names: dict[int, str], settings: Settings, tolerances: list[dict[str, Any]]
) -> dict[str, Any]:
    attempt = details.attempting(entered.warnings)
    first, feed = entered.first, entered.feeds[0]
    noise = attempt(
        "noise floor", lambda: details.noise_floor(first.path, names[id(first)], entered.references, settings)
    )
    cold: list[dict[str, Any]] = []
    for entrant in entered.running:
        model = (names[id(entrant)], entrant.path)
        cold += attempt("cold start", functools.partial(details.cold_starts, [model], feed, settings, 1.0))
    nodes: list[dict[str, Any]] = []
    fused: list[dict[str, Any]] = []
    attempt("profile by node", lambda: _profiles(entered, names, settings, nodes, fused))
    facts = details.session_facts(settings)
    return {"accuracy": [*tolerances, *noise], "cold": cold, "profile": nodes, "fusions": fused, "session": facts}


def _profiles(
    entered: Contest,
    names: dict[int, str],
    settings: Settings,
    nodes: list[dict[str, Any]],
    fused: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Fills both lists with the rows of every model against the baseline."""
    first, feed = entered.first, entered.feeds[0]
    assert first.file is not None
    before = details.profile(first.file.model, feed, first.file.folder, settings)
    for entrant in entered.running:
        if entrant is first or entrant.file is None:
            continue
        after = details.profile(entrant.file.model, feed, entrant.file.folder, settings)
        label = {"model": names[id(entrant)]}
        nodes += [{**label, **row} for row in details.node_rows(before, after, profiles.kinds(entrant.file.model))]
        fused += [{**label, **row} for row in profiles.fusions(before, after)]
    return nodes


def _comparison(
    entered: Contest, settings: Settings, timed: Sequence[Configuration], ways: Sequence[Configuration],
    parts: dict[str, Any],
) -> Comparison:  # fmt: skip
    kept = [i for i, way in enumerate(ways) if way in timed]
    return Comparison(
        rows=tuple(_row(e, kept) for e in entered.entrants),
        data="synthetic" if entered.source.synthetic else "user",
        samples=entered.references.count,
        provider=timed[0].provider if timed else settings.provider,
        threads=timed[0].threads if timed else settings.threads,
        metric=settings.metric,
        baseline=entered.entrants.index(entered.first),
        configurations=tuple(timed),
        untimed=tuple(way for way in ways if way not in timed),
        fingerprint=entered.references.fingerprint,
        parts=parts,
        warnings=tuple(entered.warnings),
    )


def _row(entrant: Entrant, kept: Sequence[int]) -> Row:
    file, losses = entrant.file, entrant.losses
    entries = [entrant.latencies[i] for i in kept] if entrant.latencies else []
    return Row(
        path=str(entrant.path),
        bytes=file.bytes if file else None,
        parameters=measure.parameters(file.model) if file else None,
        loss=losses.value() if losses and entrant.error is None else None,
        latency=entries[0] if entries else None,
        sha256=file.sha256 if file else None,
        error=entrant.error,
        latencies=tuple(entries[1:]),
        sample_losses=tuple(details.finite(losses.per_sample)) if losses else (),
    )
