"""How a long run tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]


class Progress(Protocol):
    """A listener. `stage` wraps one step; what it yields is called with the share done, 0..1."""

    def stage(self, title: str) -> AbstractContextManager[Advance]:
        """A step with a title, from entering the block to leaving it."""


class Silent:
    """Nobody listens: the default of the Python interface."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        yield lambda share: None
