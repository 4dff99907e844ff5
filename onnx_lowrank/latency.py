"""Rank → milliseconds, measured: fragments alone in the runtime, turn about, cached on disk."""

from __future__ import annotations

import contextlib
import functools
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
from onnx import helper, numpy_helper

from onnx_lowrank import runtime, timing
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.fragment import Fragment, X, Y, dtype_of
from onnx_lowrank.grouping import grouped
from onnx_lowrank.precision import Lowering
from onnx_lowrank.saving import write_bytes
from onnx_lowrank.sites import Geometry

DENSE, CONTROL = "dense", "dense again"
"""Labels of the dense fragment, and of the same once more: the A/A control."""

_FRAGMENTS = 2  # counts up when a kind builds other nodes, so that no older time is taken for them
_LEAST_NOISE, _MOST_NOISE = 0.01, 0.08
_COPIES, _OPEN_BYTES = 5, 768 << 20
_ROUNDS, _MIN_ROUNDS, _SECONDS = 9, 4, 2.0


def fragment_model(fragment: Fragment, geometry: Geometry) -> onnx.ModelProto:
    """A model that is one fragment, from `x` of the geometry's shape to `y` or through the activation after it."""
    nodes = [
        helper.make_node(op.op, list(op.inputs), [op.output], name=f"{op.owner}{op.name}", **op.attributes)
        for op in fragment.ops
    ]
    out = Y
    if geometry.then:
        out = "activated"
        nodes.append(helper.make_node(geometry.then, [Y], [out], name="then"))
    constants = [numpy_helper.from_array(array, name) for name, array in fragment.constants.items()]
    dtype = helper.np_dtype_to_tensor_dtype(dtype_of(geometry))
    x = helper.make_tensor_value_info(X, dtype, geometry.x_shape)
    graph = helper.make_graph(nodes, "fragment", [x], [onnx.ValueInfoProto(name=out)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", geometry.opset)], ir_version=8)


def processor() -> str:
    """Name of the CPU, as people know it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(provider: str, threads: int, precision: str = "") -> dict[str, Any]:
    """What the times depend on beside the geometry; the readable key of a table.

    Args:
        precision: label of a scheme; empty is the model's own.
    """
    made = {"precision": precision} if precision else {}
    return made | {
        "processor": processor(),
        "cores": os.cpu_count(),
        "runtime": runtime.version(),
        "provider": provider,
        "threads": threads,
        "fragments": _FRAGMENTS,
    }


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


def _batches(geometry: Geometry, labels: list[str]) -> Iterator[list[str]]:
    """Fragments whose sessions are open at once: each holds its activations, several times over."""
    positions = math.prod(geometry.x_shape) / max(geometry.channels or geometry.inputs, 1)
    channels = max(geometry.channels or geometry.inputs, geometry.outputs)
    held = _COPIES * positions * channels * dtype_of(geometry).itemsize
    return grouped(labels, lambda label: int(held), _OPEN_BYTES)  # noqa: ARG005


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
        if self.given:
            self.path = place
            self.environment, self._rows = read_table(place)
            here = (self.environment.get("provider"), self.environment.get("threads"))
            if here != (provider, threads):
                raise SettingsError(
                    f"{place}: measured for provider {here[0]} with {here[1]} threads; give --provider and --threads so"
                )
            if self.environment.get("precision", "") != precision:
                have = self.environment.get("precision") or "the model's own precision"
                raise SettingsError(
                    f"{place}: measured in {have}, not in {precision or 'its own'}; run analyze there "
                    "with the same --precision"
                )
        else:
            self.path = place / table_name(self.environment)
            self._rows = self._read()

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found, rows = read_table(self.path)
        except SettingsError:
            return {}
        return rows if found == self.environment else {}

    def save(self) -> None:
        """Write the table; a cache that cannot be written is not an error."""
        if self.given:
            return
        with contextlib.suppress(SettingsError):
            write_table(self.path, self.environment, self._rows)

    def rows(self, geometries: Iterable[Geometry]) -> dict[str, dict[str, float]]:
        """All that is known of some geometries, by key."""
        keys = sorted({geometry.key() for geometry in geometries})
        return {key: self._rows[key] for key in keys if self._rows.get(key)}

    def missing(self, geometry: Geometry, labels: list[str]) -> list[str]:
        """The labels that have not been measured for this geometry."""
        row = self._rows.get(geometry.key(), {})
        return [label for label in labels if label not in row]

    def noise(self, geometry: Geometry) -> float:
        """Fraction by which two timings of one fragment may differ: dense against itself, at least 1 %."""
        row = self._rows.get(geometry.key(), {})
        if DENSE not in row or CONTROL not in row:
            return _LEAST_NOISE
        return min(max(abs(row[CONTROL] / row[DENSE] - 1), _LEAST_NOISE), _MOST_NOISE)

    def measure(self, geometry: Geometry, makers: Mapping[str, Callable[[], Fragment]]) -> dict[str, float]:
        """Milliseconds by label; those not in the table are made and timed now, turn about with the dense one.

        New times are scaled by the dense fragment's, so that rows measured on different days agree. The first
        time the dense fragment is timed against itself too. A given table answers what it knows.
        """
        row = self._rows.setdefault(geometry.key(), {})
        missing = [] if self.given else self.missing(geometry, list(makers))
        if missing:
            for batch in _batches(geometry, missing):
                fragments = {label: makers[label]() for label in dict.fromkeys((DENSE, *batch))}
                if CONTROL not in row:
                    fragments[CONTROL] = fragments[DENSE]
                fresh = self._time(geometry, fragments)
                scale = row.get(DENSE, fresh[DENSE]) / fresh[DENSE]
                row.update({label: ms * scale for label, ms in fresh.items() if label not in row})
        return {label: row[label] for label in makers if label in row}

    def recall(self, key: str, timed: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Times that are no fragment's, under a key of their own; measured when unknown."""
        if key not in self._rows:
            self._rows[key] = timed()
            self.save()
        return self._rows[key]

    def _deployed(self, model: onnx.ModelProto, x: npt.NDArray[Any]) -> tuple[onnx.ModelProto, runtime.Feed]:
        return (model, {X: x}) if self._lowering is None else self._lowering.fragment(model, x)

    def _time(self, geometry: Geometry, fragments: Mapping[str, Fragment]) -> dict[str, float]:
        rng = np.random.default_rng(self._seed)
        x = rng.standard_normal(geometry.x_shape).astype(dtype_of(geometry))
        made = [self._deployed(fragment_model(f, geometry), x) for f in fragments.values()]
        runs = [
            functools.partial(runtime.Session(m, provider=self.provider, threads=self.threads, spin=True).run, feed)
            for m, feed in made
        ]
        samples = timing.interleave(
            runs, rounds=_ROUNDS, seconds=_SECONDS, seed=self._seed, warmup=1, min_rounds=_MIN_ROUNDS
        )
        times, _ = samples.of(self.provider, self.threads)
        return {label: float(ms) for label, ms in zip(fragments, np.median(times, axis=0) * 1e3, strict=True)}
