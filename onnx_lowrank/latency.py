"""Rank → milliseconds, measured: fragments alone in the runtime, turn about, cached on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lowrank import runtime, timing
from onnx_lowrank.fragment import Fragment, X, Y, dtype_of
from onnx_lowrank.sites import Geometry

DENSE = "dense"
_ROUNDS, _MIN_ROUNDS, _SECONDS = 9, 4, 2.0


def fragment_model(fragment: Fragment, geometry: Geometry) -> onnx.ModelProto:
    """A model that is one fragment, from `x` of the geometry's shape to `y`."""
    nodes = [
        helper.make_node(op.op, list(op.inputs), [op.output], name=op.name, **op.attributes) for op in fragment.ops
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in fragment.constants.items()]
    dtype = helper.np_dtype_to_tensor_dtype(dtype_of(geometry))
    x = helper.make_tensor_value_info(X, dtype, geometry.x_shape)
    graph = helper.make_graph(nodes, "fragment", [x], [onnx.ValueInfoProto(name=Y)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", geometry.opset)], ir_version=8)


def processor() -> str:
    """Name of the CPU, as people know it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class LatencyTable:
    """Measured milliseconds by geometry and label (`dense`, `svd 64`, …), kept in one readable JSON file.

    The file's name is a hash of what the times depend on; the file says in words what that is.
    A damaged or foreign file counts as empty.
    """

    def __init__(self, folder: Path, *, provider: str, threads: int, seed: int = 0) -> None:
        self.provider, self.threads, self._seed = provider, threads, seed
        self.environment = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "runtime": runtime.version(),
            "provider": provider,
            "threads": threads,
        }
        digest = hashlib.sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"latency-{digest}.json"
        self._rows: dict[str, dict[str, float]] = self._read()
        self.measured = 0

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            table = json.loads(self.path.read_text())
            if table["environment"] != self.environment:
                return {}
            return {k: {n: float(ms) for n, ms in row.items()} for k, row in table["ms"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def save(self) -> None:
        """Write the table; a cache that cannot be written is not an error."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump({"environment": self.environment, "ms": self._rows}, file, indent=1, sort_keys=True)
            Path(name).replace(self.path)

    def rows(self, geometries: Iterable[Geometry]) -> dict[str, dict[str, float]]:
        """All that is known of some geometries, by key."""
        keys = sorted({geometry.key() for geometry in geometries})
        return {key: self._rows[key] for key in keys if self._rows.get(key)}

    def missing(self, geometry: Geometry, labels: list[str]) -> list[str]:
        """The labels that have not been measured for this geometry."""
        row = self._rows.get(geometry.key(), {})
        return [label for label in labels if label not in row]

    def measure(self, geometry: Geometry, makers: Mapping[str, Callable[[], Fragment]]) -> dict[str, float]:
        """Milliseconds by label; those not in the table are made and timed now, turn about with the dense one.

        New times are scaled by the dense fragment's, so that rows measured on different days agree.
        """
        row = self._rows.setdefault(geometry.key(), {})
        missing = self.missing(geometry, list(makers))
        if missing:
            labels = [DENSE, *(label for label in missing if label != DENSE)]
            fresh = self._time(geometry, {label: makers[label]() for label in labels})
            scale = row.get(DENSE, fresh[DENSE]) / fresh[DENSE]
            row.update({label: ms * scale for label, ms in fresh.items()})
            self.measured += len(labels)
        return {label: row[label] for label in makers}

    def _time(self, geometry: Geometry, fragments: Mapping[str, Fragment]) -> dict[str, float]:
        rng = np.random.default_rng(self._seed)
        x = rng.standard_normal(geometry.x_shape).astype(dtype_of(geometry))
        sessions = [
            runtime.Session(fragment_model(f, geometry), provider=self.provider, threads=self.threads)
            for f in fragments.values()
        ]
        runs = [functools.partial(s.run, {X: x}) for s in sessions]
        samples = timing.interleave(
            runs, rounds=_ROUNDS, seconds=_SECONDS, seed=self._seed, warmup=1, min_rounds=_MIN_ROUNDS
        )
        cpu = self.threads == 1 and self.provider == "cpu"
        times = samples.cpu if cpu else samples.wall
        return {label: float(ms) for label, ms in zip(fragments, np.median(times, axis=0) * 1e3, strict=True)}
