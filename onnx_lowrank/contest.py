"""The models of a comparison: which can be read, run and timed; one that fails says why and leaves the rest alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import measure, runtime, sessions
from onnx_lowrank.data import Source, turn_about
from onnx_lowrank.errors import LowRankError, ModelError, RuntimeMissing, SettingsError
from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.measure import Latency
from onnx_lowrank.metrics import new_loss
from onnx_lowrank.prepare import open_inputs
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Feed, Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import Loss, References

_SECONDS, _LEAST_SECONDS = 20.0, 6.0


@dataclasses.dataclass
class Entrant:
    """One model on its way through a comparison; `error` says in one line why it is out."""

    path: Path
    file: ModelFile | None = None
    error: str | None = None
    losses: Loss | None = None
    latencies: list[Latency | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Configuration:
    """One way of timing all models."""

    provider: str
    threads: int
    feed: Feed

    @property
    def name(self) -> str:
        """For warnings."""
        return f"{self.provider}, {self.threads} thread{'' if self.threads == 1 else 's'}, {_shapes(self.feed)}"

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        shape = {name: list(getattr(array, "shape", ())) for name, array in self.feed.items()}
        options = dict(Provider.of(self.provider).options)
        return {"provider": str(self.provider), "provider_options": options, "threads": self.threads, "shape": shape}


def _shapes(feed: Feed) -> str:
    return ", ".join(f"{n} {'×'.join(map(str, getattr(a, 'shape', ())))}" for n, a in feed.items())


@dataclasses.dataclass(frozen=True)
class Contest:
    """The models, the baseline among them (the first that works), and what all are run on."""

    entrants: list[Entrant]
    first: Entrant
    references: References
    source: Source
    feeds: tuple[Feed, ...]
    warnings: list[str]

    @property
    def running(self) -> list[Entrant]:
        """The models that are still in, in the order given."""
        return [e for e in self.entrants if e.error is None]


def usable(providers: Sequence[str], warnings: list[str]) -> list[str]:
    """The providers that this ONNX Runtime has; the others become warnings.

    Raises:
        LowRankError: it has none of them.
    """
    found: list[str] = []
    fault: LowRankError = SettingsError("compare needs a provider")
    for provider in providers:
        try:
            runtime.provider_name(provider)
            found.append(provider)
        except LowRankError as one:
            fault = one
            warnings.append(f"not timed on {provider}: {one}")
    if not found:
        raise fault
    return found


def enter(paths: Sequence[Path], data: Any, settings: Settings, warnings: list[str]) -> Contest:
    """Read the models; the first that runs on the data is the baseline, and gives the reference outputs.

    Raises:
        LowRankError: none of them runs, or the data does not fit.
    """
    entrants = [_read(path) for path in paths]
    for entrant in (e for e in entrants if e.error is None):
        try:
            session = Session(entrant.path, provider=settings.provider, threads=0)
            source, feeds = _inputs(session, data, settings, entrant.file, warnings)
            counter = new_loss(settings.metric, session.output_names, settings.output_weights)
            references = References(session, source, counter)
        except ModelError as fault:
            entrant.error = _about(entrant, fault)
            continue
        return Contest(entrants, entrant, references, source, feeds, warnings)
    raise ModelError("no model could be run: " + "; ".join(_with_path(e) for e in entrants))


def _read(path: Path) -> Entrant:
    try:
        return Entrant(path, read_model(path))
    except (LowRankError, OSError) as fault:
        entrant = Entrant(path)
        entrant.error = _about(entrant, fault)
        return entrant


def _about(entrant: Entrant, fault: Exception) -> str:
    """One line; the path stands beside it already."""
    return " ".join(str(fault).removeprefix(f"{entrant.path}: ").split())


def _with_path(entrant: Entrant) -> str:
    return f"{entrant.path}: {entrant.error}"


def _inputs(
    session: Session, data: Any, settings: Settings, file: ModelFile | None, warnings: list[str]
) -> tuple[Source, tuple[Feed, ...]]:
    """The samples, and one feed for each set of shapes that the model accepts.

    Without data the samples are made up in all of these shapes that the model runs on, in turn.
    """
    if not settings.shapes:
        return open_inputs(session, data, settings, file)
    feeds: list[Feed] = []
    made: list[Source] = []
    refused: list[SettingsError] = []
    each = max(1, settings.samples // len(settings.shapes))
    for shapes in settings.shapes:
        try:
            asked = dataclasses.replace(settings, shapes=(shapes,), samples=each)
            source, one = open_inputs(session, None, asked, file)
        except SettingsError as fault:
            refused.append(fault)
            continue
        feeds += one
        made.append(source)
    if not feeds:
        raise refused[0]
    warnings += [f"a shape was not timed: {fault}" for fault in refused]
    if data is not None:
        return open_inputs(session, data, dataclasses.replace(settings, shapes=()), file)[0], tuple(feeds)
    failing = _failing(session, feeds)
    return turn_about([s for s, feed in zip(made, feeds, strict=True) if _shapes(feed) not in failing]), tuple(feeds)


def _failing(session: Session, feeds: Sequence[Feed]) -> dict[str, ModelError]:
    """The shapes that a model does not run on, with the reason; not looked for where there is only one.

    Raises:
        ModelError: it runs on none of them.
    """
    found: dict[str, ModelError] = {}
    for feed in feeds if len(feeds) > 1 else ():
        try:
            session.run(feed)
        except ModelError as fault:
            found[_shapes(feed)] = fault
    if found and len(found) == len({_shapes(feed) for feed in feeds}):
        raise next(iter(found.values()))
    return found


def judge(contest: Contest, settings: Settings, visit: Any) -> None:
    """Loss of every model; who cannot run on the samples is out.

    Args:
        visit: called with each model, its session while that is open, and the references that it runs on.

    Raises:
        ModelError: fewer than two models are left.
    """
    for entrant in contest.running:
        try:
            session = Session(entrant.path, provider=settings.provider, threads=0, purpose="verify")
            missing = [name for name in contest.references.outputs if name not in session.output_names]
            if missing:
                raise ModelError(f"has no output '{missing[0]}'; compare models with the same inputs and outputs")
            references = _accepted(contest, entrant, session)
            entrant.losses = references.loss(session)
            if not entrant.losses.per_sample:
                raise ModelError("runs on none of the shapes that the first model runs on")
            visit(entrant, session, references)
        except ModelError as fault:
            entrant.error = _about(entrant, fault)
    if len(contest.running) < 2:
        failed = "; ".join(_with_path(e) for e in contest.entrants if e.error is not None)
        raise ModelError(f"fewer than two models could be compared: {failed}")


def _accepted(contest: Contest, entrant: Entrant, session: Session) -> References:
    """The references without the shapes that a model does not run on, with a warning; all of them with given data."""
    failing = _failing(session, contest.feeds) if contest.source.synthetic else {}
    for shapes, fault in failing.items():
        if entrant is not contest.first:
            contest.warnings.append(f"the loss of {entrant.path} is without {shapes}: {_about(entrant, fault)}")
    return contest.references.only(lambda feed: _shapes(feed) not in failing)


def configurations(ways: Sequence[tuple[str, int]], feeds: Sequence[Feed]) -> list[Configuration]:
    """Every provider and number of threads with every set of shapes."""
    return [Configuration(*way, feed) for way, feed in itertools.product(ways, feeds)]


def race(contest: Contest, configuration: Configuration, settings: Settings, count: int) -> bool:
    """Time the models that are still in under one configuration, an entry for each; False when the baseline fails.

    Args:
        count: of configurations, which share the time.
    """
    for entrant in contest.entrants:
        entrant.latencies.append(None)
    ready = [e for e in contest.running if _runs(e, configuration, contest.warnings)]
    if contest.first not in ready or len(ready) < 2:
        return False
    others = [e for e in ready if e is not contest.first]
    found = measure.race(
        [contest.first.path, *(e.path for e in others)],
        configuration.feed,
        provider=configuration.provider,
        threads=configuration.threads,
        seed=settings.seed,
        seconds=max(_SECONDS / count, _LEAST_SECONDS),
        streams=settings.streams,
        short=sessions.THOROUGH,
    )
    for entrant, latency in zip(others, found, strict=True):
        entrant.latencies[-1] = latency
    return True


def _runs(entrant: Entrant, configuration: Configuration, warnings: list[str]) -> bool:
    try:
        session = Session(entrant.path, provider=configuration.provider, threads=configuration.threads)
        session.run(configuration.feed)
    except (ModelError, RuntimeMissing) as fault:
        warnings.append(f"{entrant.path} was not timed with {configuration.name}: {_about(entrant, fault)}")
        return False
    return True
