"""What a report says of the hardware beside the processor: the card, and the nodes that it left to the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx_lowrank import gpu
from onnx_lowrank.placement import placed, sentence
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Feed

MOST_LISTED = 50


def card(provider: str) -> dict[str, Any]:
    """`gpu`: name, driver, clocks, temperature and power of the card now; empty for other providers."""
    chosen = Provider.of(provider)
    if not chosen.on_device:
        return {}
    found = gpu.facts(int(chosen.options.get("device_id", 0)))
    return {"gpu": found} if found else {}


def hardware(model: Path, feed: Feed, provider: str, threads: int, warnings: list[str]) -> dict[str, Any]:
    """The card now, and `fallback`: the nodes of a model that did not run on its provider, the slowest first.

    Empty on the CPU, and where the provider is only planned for. A warning is added when nodes were left.
    """
    chosen = Provider.of(provider)
    if not chosen.here or chosen.short == "cpu":
        return {}
    found = card(chosen)  # before anything else runs: clocks and temperature are those of the timing
    left = placed(model, feed, model.parent, provider=chosen, threads=threads)
    if text := sentence(left, chosen.short):
        warnings.append(text)
    return {**found, "fallback": [placement.to_dict() for placement in left[:MOST_LISTED]]}
