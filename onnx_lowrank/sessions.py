"""Timing across several sessions of each model: the interval holds what differs from session to session, too.

Two sessions of one model differ by one or two percent for as long as they live: their weights and buffers lie
elsewhere in memory. Rounds within one pair of sessions cannot see that. So each model is opened anew several times, in
a random order, and the spread of the ratio over those groups makes the interval (docs/decisions/030).
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special

from onnx_lowrank import timing
from onnx_lowrank.linalg import Array
from onnx_lowrank.memory import give_back
from onnx_lowrank.timing import Ratio, Samples

Opener = Callable[[], Callable[[], object]]
"""Opens a new session of a model and returns what runs it once."""

GROUPS, LEAST_GROUPS = 8, 5
_LEAST_ROUNDS, _ROUNDS, _MOST_ROUNDS = 2, 9, 84
"""A group makes the least number whatever it takes, the middle one while time lasts, and the most when runs are so
short that they take no time: 8 × 9 rounds allow a 90th percentile, 8 × 84 a 99th."""

SHORT, THOROUGH = 0.05, 0.4
"""Seconds that count as no time, in each group: of a verification, and of a comparison, where tails are looked at."""

_YARDSTICK = bytes(1 << 18)


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds of every run, rounds × models; `groups` are the rounds of each group of sessions.

    `speed` is the time of one fixed computation after each group, over the least of them: above 1 the processor was
    slower then.
    """

    samples: Samples
    groups: tuple[int, ...]
    speed: tuple[float, ...]

    def of(self, provider: str, threads: int) -> tuple[Array, str]:
        """The times to trust, whole nanoseconds so that JSON keeps them, and their clock."""
        times, clock = self.samples.of(provider, threads)
        return np.maximum(np.round(times, 9), 1e-9), clock  # a coarse clock may say that no time passed


def race(openers: Sequence[Opener], *, seconds: float, seed: int, short: float = THOROUGH, apart: bool = False) -> Race:
    """Time models turn about, in groups of fresh sessions that are opened in a random order.

    Args:
        seconds: of wall time for all groups with their loading; at least 5 groups of 2 rounds are made.
        short: rounds beyond the ninth of a group are made for so many seconds.
        apart: in each group one model after the other is opened, timed and closed, so that never more than one is open.
            What changes between them on the machine shows in the spread of the groups, of the control too.
    """
    rng = np.random.default_rng(seed)
    found: list[Samples] = []
    speed: list[float] = []
    since = time.perf_counter()
    while len(found) < GROUPS and (len(found) < LEAST_GROUPS or time.perf_counter() - since < seconds):
        slice_end = since + seconds * (len(found) + 1) / GROUPS
        found.append((_apart if apart else _group)(openers, rng, slice_end, short))
        speed.append(_fixed_computation())
    samples = Samples(np.concatenate([s.cpu for s in found]), np.concatenate([s.wall for s in found]))
    return Race(samples, tuple(len(s.cpu) for s in found), tuple(round(s / min(speed), 4) for s in speed))


def _group(openers: Sequence[Opener], rng: np.random.Generator, end: float, short: float) -> Samples:
    runs: list[Callable[[], object]] = [_nothing] * len(openers)
    for index in rng.permutation(len(openers)):
        runs[index] = openers[index]()
    return _timed(runs, rng, end, short)


def _apart(openers: Sequence[Opener], rng: np.random.Generator, end: float, short: float) -> Samples:
    """A group whose sessions are open one at a time; each makes as many rounds as the one that makes fewest."""
    found: dict[int, Samples] = {}
    for index in map(int, rng.permutation(len(openers))):
        now, left = time.perf_counter(), len(openers) - len(found)
        found[index] = _timed([openers[index]()], rng, now + max(end - now, 0.0) / left, short / len(openers))
        give_back()
    rounds = min(len(one.cpu) for one in found.values())
    each = [found[index] for index in range(len(openers))]
    return Samples(np.hstack([one.cpu[:rounds] for one in each]), np.hstack([one.wall[:rounds] for one in each]))


def _timed(runs: Sequence[Callable[[], object]], rng: np.random.Generator, end: float, short: float) -> Samples:
    timing.warm_up(runs, seconds=max(0.1, (end - time.perf_counter()) / 3))
    cpu: list[Array] = []
    wall: list[Array] = []
    begun = time.perf_counter()
    while len(cpu) < _MOST_ROUNDS:
        now = time.perf_counter()
        enough = _LEAST_ROUNDS if now > end else _ROUNDS if now - begun > short else _MOST_ROUNDS
        if len(cpu) >= enough:
            break
        one = timing.one_round(runs, rng)
        cpu.append(one.cpu)
        wall.append(one.wall)
    return Samples(np.array(cpu), np.array(wall))


def _nothing() -> None:
    """Stands where no session is yet."""


def _fixed_computation() -> float:
    """Seconds of the core for the same small computation, the best of five."""
    best = float("inf")
    for _ in range(5):
        since = time.thread_time()
        hashlib.sha256(_YARDSTICK)
        best = min(best, time.thread_time() - since)
    return best


def logs(a: Array, b: Array, groups: Sequence[int]) -> Array:
    """Median of `log(a/b)` in each group of rounds."""
    ends = np.cumsum(groups)
    ratios = np.log(a / b)
    return np.array([np.median(part) for part in np.split(ratios, ends[:-1])])


def ratio(a: Array, b: Array, groups: Sequence[int], control: Array | None = None) -> Ratio:
    """The ratio `a/b` over groups of sessions, with a 95 % interval.

    The mean of the groups' median log ratios, and Student's t over the groups. Their spread is taken to be at least
    that of the control, which shows the same noise: few groups can agree by chance.

    Args:
        a, b: seconds, one entry a round.
        groups: rounds of each group.
        control: the original timed a second time in the same rounds.
    """
    found = logs(a, b, groups)
    if len(found) < 2:
        return timing.paired_ratio(a, b)
    spread = float(found.std(ddof=1))
    if control is not None:
        spread = max(spread, float(logs(control, a, groups).std(ddof=1)))
    half = float(scipy.special.stdtrit(len(found) - 1, 0.975)) * spread / len(found) ** 0.5
    middle = float(found.mean())
    return Ratio(float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half)))
