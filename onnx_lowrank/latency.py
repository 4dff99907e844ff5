"""Rank → milliseconds, measured: fragments alone in the runtime, turn about, cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank import gpu, runtime, timing
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.fragment import Fragment, X, dtype_of
from onnx_lowrank.fragments import copies_for
from onnx_lowrank.fragments import fragment_model as fragment_model
from onnx_lowrank.grouping import grouped
from onnx_lowrank.measure import WARM_SECONDS
from onnx_lowrank.precision import Lowering
from onnx_lowrank.providers import Provider
from onnx_lowrank.saving import write_bytes
from onnx_lowrank.sites import Geometry

DENSE, CONTROL = "dense", "dense again"
"""Labels of the dense fragment, and of the same once more: the A/A control."""

_FRAGMENTS = 2  # counts up when a kind builds other nodes, so that no older time is taken for them
_LEAST_NOISE, _MOST_NOISE = 0.01, 0.08
_COPIES, _OPEN_BYTES = 5, 768 << 20
_ROUNDS, _MIN_ROUNDS, _SECONDS = 9, 4, 1.5


def processor() -> str:
    """Name of the CPU, as people know it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(provider: str, threads: int, precision: str = "") -> dict[str, Any]:
    """What the times depend on beside the geometry; the readable key of a table (docs/tables.md)."""
    chosen = Provider.of(provider)
    found: dict[str, Any] = {"precision": precision} if precision else {}
    found |= {
        "processor": processor(),
        "cores": os.cpu_count(),
        "runtime": runtime.version(),
        "provider": str(provider),
        "threads": threads,
        "fragments": _FRAGMENTS,
    }
    if chosen.options:
        found["provider_options"] = dict(chosen.options)
    if chosen.on_device:
        card = gpu.identity(int(chosen.options.get("device_id", 0)))
        found |= {"gpu" if key == "name" else key: value for key, value in card.items()}
    return found


def machine(environment: Mapping[str, Any]) -> str:
    """The card or the processor that a table was measured on."""
    return str(environment.get("gpu") or environment.get("processor") or "an unnamed machine")


def noise_of(row: Mapping[str, float]) -> float:
    """Fraction by which two timings of one fragment may differ: dense against itself, at least 1 %."""
    if DENSE not in row or CONTROL not in row:
        return _LEAST_NOISE
    return min(max(abs(row[CONTROL] / row[DENSE] - 1), _LEAST_NOISE), _MOST_NOISE)


def table_name(environment: Mapping[str, Any]) -> str:
    """File name of the table of an environment."""
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
    return f"latency-{digest}.json"


def read_table(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Environment and milliseconds (by geometry, by label) of a table file.

    Raises:
        SettingsError: missing or not a table.
    """
    try:
        table = json.loads(path.read_text())
        rows = {key: {label: float(ms) for label, ms in row.items()} for key, row in table["ms"].items()}
        return dict(table["environment"]), rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise SettingsError(f"{path}: not a latency table ({fault}); write one with `cache export`") from None


def write_table(path: Path, environment: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> None:
    """Write a table file, whole or not at all.

    Raises:
        SettingsError: it cannot be written.
    """
    text = json.dumps({"environment": environment, "ms": rows}, indent=1, sort_keys=True)
    write_bytes(path, text.encode())


def _held(geometry: Geometry) -> int:
    """Bytes of a fragment's activations, several times over."""
    read = geometry.channels * geometry.groups or geometry.inputs
    positions = math.prod(geometry.x_shape) / max(read, 1)
    channels = max(read, geometry.outputs)
    return int(_COPIES * positions * channels * dtype_of(geometry).itemsize)


def _batches(geometry: Geometry, labels: list[str], copies: int) -> Iterator[list[str]]:
    """Fragments whose sessions are open at once: each holds its activations and its weights, several times over."""
    weights = geometry.outputs * geometry.inputs * dtype_of(geometry).itemsize // 2  # factors have less than that
    held = (_held(geometry) + _COPIES * weights) * copies
    return grouped(labels, lambda label: held, _OPEN_BYTES)  # noqa: ARG005


class LatencyTable:
    """Measured milliseconds by geometry and label (`dense`, `svd 64`, …), kept in one readable JSON file.

    The file's name is a hash of what the times depend on; the file says in words what that is.
    A damaged or foreign file counts as empty.

    Args:
        place: the cache folder; or a file that `cache export` wrote, here or on the machine that will run the
            model: then nothing is timed here, and what the file does not hold is unknown.
        lowering: makes the precision that fragments are timed in; None is the model's own.

    Raises:
        SettingsError: a file that is no table, or one for another provider or thread count.
    """

    def __init__(
        self, place: Path, *, provider: str, threads: int, seed: int = 0, lowering: Lowering | None = None
    ) -> None:
        self.provider, self.threads, self._seed, self._lowering = provider, threads, seed, lowering
        precision = lowering.scheme.label if lowering else ""
        self.environment: dict[str, Any] = environment(provider, threads, precision)
        self.given = place.is_file()
        self._changed = False
        if self.given:
            self.path = place
            self.environment, self._rows = read_table(place)
            self._check(place, precision)
        else:
            self.path = place / table_name(self.environment)
            self._rows = self._read()

    def _check(self, place: Path, precision: str) -> None:
        made = self.environment.get("precision") or ""
        if made != precision:
            word = made.partition(" ")[0]
            how = f"give --precision {word}" if word else "leave --precision out"
            raise SettingsError(f"{place}: measured in {made or 'the precision of the models'}; {how}")
        there = (self.environment.get("provider"), self.environment.get("threads"))
        if there != (self.provider, self.threads):
            raise SettingsError(
                f"{place}: measured for provider {there[0]} with {there[1]} threads; give --provider and --threads so"
            )
        options = self.environment.get("provider_options") or {}
        if options != Provider.of(self.provider).options:
            words = " ".join(f"--provider-option {k}={v}" for k, v in options.items()) or "no --provider-option"
            raise SettingsError(f"{place}: measured with other options of the provider; give {words}")

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found, rows = read_table(self.path)
        except SettingsError:
            return {}
        return rows if found == self.environment else {}

    def save(self) -> None:
        """Write the table where anything is new; a cache that cannot be written is not an error."""
        if self.given or not self._changed:
            return
        with contextlib.suppress(SettingsError):
            write_table(self.path, self.environment, self._rows)
            self._changed = False

    def rows(self, geometries: Iterable[Geometry]) -> dict[str, dict[str, float]]:
        """All that is known of some geometries, by key."""
        keys = sorted({geometry.key() for geometry in geometries})
        return {key: self._rows[key] for key in keys if self._rows.get(key)}

    def missing(self, geometry: Geometry, labels: list[str]) -> list[str]:
        """The labels that have not been measured for this geometry."""
        row = self._rows.get(geometry.key(), {})
        return [label for label in labels if label not in row]

    def labels(self, geometry: Geometry) -> set[str]:
        """What is known of this geometry."""
        return set(self._rows.get(geometry.key(), {}))

    def known(self, key: str) -> dict[str, float]:
        """What is kept under a key of `recall`; empty when unknown."""
        return self._rows.get(key, {})

    def lacks(self, geometries: Iterable[Geometry]) -> bool:
        """Whether a given table does not know the dense time of all of these."""
        return self.given and any(self.missing(geometry, [DENSE]) for geometry in geometries)

    def noise(self, geometry: Geometry) -> float:
        """Fraction by which two timings of a fragment of this geometry may differ."""
        return noise_of(self._rows.get(geometry.key(), {}))

    def measure(self, geometry: Geometry, makers: Mapping[str, Callable[[], Fragment]]) -> dict[str, float]:
        """Milliseconds by label; those not in the table are made and timed now, turn about with the dense one.

        New times are scaled by the dense fragment's, so that rows measured on different days agree. The first
        time the dense fragment is timed against itself too. A given table answers what it knows.
        """
        row = self._rows.setdefault(geometry.key(), {})
        missing = [] if self.given else self.missing(geometry, list(makers))
        if missing:
            copies = self._copies(geometry, makers[DENSE]())
            for batch in _batches(geometry, missing, copies):
                fragments = {label: makers[label]() for label in dict.fromkeys((DENSE, *batch))}
                if CONTROL not in row:
                    fragments[CONTROL] = fragments[DENSE]
                fresh = self._time(geometry, fragments, copies)
                scale = row.get(DENSE, fresh[DENSE]) / fresh[DENSE]
                row.update({label: ms * scale for label, ms in fresh.items() if label not in row})
                self._changed = True
        return {label: row[label] for label in makers if label in row}

    def recall(self, key: str, timed: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Times that are no fragment's, under a key of their own; measured when unknown."""
        if key not in self._rows:
            self._rows[key] = timed()
            self._changed = True
            self.save()
        return self._rows[key]

    def _copies(self, geometry: Geometry, dense: Fragment) -> int:
        """How many copies of a fragment are timed in one graph: on a card the dense one takes a millisecond then."""
        if not Provider.of(self.provider).on_device or (self._lowering and self._lowering.scheme.precision == "int8"):
            return 1
        weights = sum(array.nbytes for array in dense.constants.values())
        return copies_for(self._time(geometry, {DENSE: dense}, 1)[DENSE], _held(geometry) + weights)

    def _deployed(
        self, model: onnx.ModelProto, x: npt.NDArray[Any], copies: int
    ) -> tuple[onnx.ModelProto, runtime.Feed]:
        """A fragment's model in the precision that is asked for, and what it is fed."""
        if self._lowering is None:
            return model, {X if n == 0 else f"{X}_{n}": x for n in range(copies)}
        return self._lowering.fragment(model, x)

    def _time(self, geometry: Geometry, fragments: Mapping[str, Fragment], copies: int) -> dict[str, float]:
        rng = np.random.default_rng(self._seed)
        x = rng.standard_normal(geometry.x_shape).astype(dtype_of(geometry))
        where: dict[str, Any] = {
            "provider": Provider.of(self.provider).without_engines(),
            "threads": self.threads,
            "spin": True,
            "purpose": "time",
        }
        runs = []
        for fragment in fragments.values():
            model, feed = self._deployed(fragment_model(fragment, geometry, copies), x, copies)
            runs.append(runtime.Session(model, **where).timed(feed))
            del model
        warm = WARM_SECONDS / 5 if Provider.of(self.provider).on_device else 0.0
        samples = timing.interleave(
            runs, rounds=_ROUNDS, seconds=_SECONDS, seed=self._seed, warmup=1, min_rounds=_MIN_ROUNDS, warm_seconds=warm
        )
        times, _ = samples.of(self.provider, self.threads)
        ms = np.median(times, axis=0) * 1e3 / copies
        return {label: float(one) for label, one in zip(fragments, ms, strict=True)}
