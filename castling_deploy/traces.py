"""Graphs that are asked for twice are traced once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Graph = TypeVar("Graph")
_known: ContextVar[dict[Any, Any] | None] = ContextVar("known", default=None)


@contextmanager
def traced_once() -> Iterator[None]:
    """A block in which a network is not changed, so that a graph of it stays what it is."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def remembered(key: Any, trace: Callable[[], Graph]) -> Graph:
    """What `trace` returns: once for every `key` in a block of `traced_once`, anew outside of one."""
    known = _known.get()
    if known is None:
        return trace()
    if key not in known:
        known[key] = trace()
    graph: Graph = known[key]
    return graph
