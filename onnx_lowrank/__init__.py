"""onnx-lowrank: low-rank factorisation of trained ONNX models, measured to be faster on the machine that runs them.

>>> report = onnx_lowrank.optimize("model.onnx", "out.onnx", data="samples.npz", max_loss=0.01)
>>> report.verdict.sentence()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_lowrank.compare import Comparison, compare
    from onnx_lowrank.errors import LowRankError
    from onnx_lowrank.pipeline import analyze, apply, optimize, sweep
    from onnx_lowrank.plan import Plan
    from onnx_lowrank.report import Report
    from onnx_lowrank.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "LowRankError",
    "Plan",
    "Report",
    "Settings",
    "analyze",
    "apply",
    "compare",
    "optimize",
    "sweep",
]

_HOMES = {
    **dict.fromkeys(("Comparison", "compare"), "compare"),
    **dict.fromkeys(("analyze", "apply", "optimize", "sweep"), "pipeline"),
    "LowRankError": "errors",
    "Plan": "plan",
    "Report": "report",
    "Settings": "settings",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can catch Ctrl-C while scipy and onnx are still being imported.
    if name not in _HOMES:
        raise AttributeError(f"module 'onnx_lowrank' has no attribute '{name}'")
    return getattr(importlib.import_module(f"onnx_lowrank.{_HOMES[name]}"), name)
