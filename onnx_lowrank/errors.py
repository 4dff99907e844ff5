"""Errors a user can meet. Each message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "DataError",
    "LowRankError",
    "ModelError",
    "PassError",
    "RequirementError",
    "RuntimeMissing",
    "SettingsError",
    "VerificationError",
]


class LowRankError(Exception):
    """Base of every error that onnx-lowrank raises on purpose; `exit_code` is what the CLI ends with."""

    exit_code = 2


class SettingsError(LowRankError):
    """An option, an output path or a plan that cannot be used."""


class ModelError(LowRankError):
    """A model file that is missing, broken, or that the runtime cannot run."""


class DataError(LowRankError):
    """Calibration data that does not fit the model."""


class PassError(LowRankError):
    """A rewrite that would break the graph; a bug in a pass, never the user's fault."""


class RuntimeMissing(LowRankError):  # noqa: N818
    """ONNX Runtime, or the execution provider asked for, is not there."""


class RequirementError(LowRankError):
    """A `--require-…` guard was not met; nothing was written."""

    exit_code = 3


class VerificationError(LowRankError):
    """The saved file did not hold what was promised; nothing was written."""

    exit_code = 4
