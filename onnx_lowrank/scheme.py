"""How a precision is made, as a value: what a plan records, and what decides which tables of times hold."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The choices behind `--precision`, each of them measured.

    Attributes:
        precision: `fp16` or `int8`.
        method: of int8: `static` (ranges from calibration) or `dynamic` (as the values come; MatMul and Gemm only).
        ranges: of static: `extremes` of the calibration samples, or `clipped` to the least squared error.
        linear_only: of static: elementwise arithmetic stays in float.
        biases: of static: whether biases take back the mean of what rounding the weights costs.
        exclude: sites and nodes that stay in float.
    """

    precision: str
    method: str = ""
    ranges: str = ""
    linear_only: bool = False
    biases: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What times depend on: the key of a latency table."""
        return " ".join(part for part in (self.precision, self.method, "linear" if self.linear_only else "") if part)

    def words(self) -> str:
        """As the verdict says it."""
        if not self.method:
            return self.precision
        parts = [self.method, *(["linear operators"] if self.linear_only else [])]
        if self.exclude:
            parts.append(f"{len(self.exclude)} nodes in float")
        return f"{self.precision} ({', '.join(parts)})"

    @classmethod
    def from_table(cls, table: dict[str, Any] | None) -> Scheme | None:
        """Out of a plan's JSON."""
        if table is None:
            return None
        return cls(**{**table, "exclude": tuple(str(name) for name in table.get("exclude", ()))})
