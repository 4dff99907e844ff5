"""What a report says of the hardware beside the processor: the card, and the nodes that it left to the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
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


def left_out(
    name: str, model: Path, ways: Iterable[tuple[str, int, Feed]], attempt: Callable[..., Any], warnings: list[str]
) -> list[dict[str, Any]]:
    """The nodes of a compared model that did not run on the provider of a way of timing; none for the CPU.

    A node stands once for each provider, however many shapes and threads there are; so does the warning that counts
    the nodes, unless another shape leaves others.

    Args:
        attempt: runs a part of the report so that its failure is a warning.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[tuple[str, int]] = set()
    for provider, threads, feed in ways:
        chosen = Provider.of(provider)
        if not chosen.here or chosen.short == "cpu" or (chosen.short, id(feed)) in seen:
            continue
        seen.add((chosen.short, id(feed)))
        place = functools.partial(placed, model, feed, model.parent, provider=chosen, threads=threads)
        left = attempt(f"placement of the nodes of {name} on {chosen.short}", place)
        if (text := sentence(left, chosen.short)) and f"{name}: {text}" not in warnings:
            warnings.append(f"{name}: {text}")
        for one in left[:MOST_LISTED]:
            row = {"model": name, "provider": chosen.short, **one.to_dict()}
            found.setdefault((chosen.short, one.node), row)
    return list(found.values())
