"""Lists cut into groups that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], size_of: Callable[[T], int], limit: int, most: int | None = None) -> Iterator[list[T]]:
    """Groups of neighbours with sizes of `limit` together at most, of `most` items at most; one alone may exceed it."""
    group: list[T] = []
    size = 0
    for item in items:
        more = size_of(item)
        if group and (size + more > limit or len(group) == most):
            yield group
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group
