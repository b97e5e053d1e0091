"""Where people read: a console on stderr, and the stages of a run with their time."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from castling_deploy.progress import Advance

WIDTH = 110  # where stderr is no terminal


def stderr_console(descriptor: int | None = None) -> Console:
    """A console on stderr, or on another file descriptor. Square brackets in texts and paths are just that."""
    file = sys.stderr if descriptor is None else os.fdopen(descriptor, "w", encoding="utf-8")
    return Console(file=file, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDTH)


class StderrProgress:
    """Stages on the real stderr, even while a toolchain's noise is held back from file descriptor 2.

    Stages of several threads may run at the same time: a bar for each, in one display while there is any.
    """

    def __init__(self) -> None:
        self.console = stderr_console(os.dup(sys.stderr.fileno()))
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._stages = 0

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """A bar while the stage runs (on a terminal), one line with its time when it is over."""
        started = time.perf_counter()
        bars = self._opened()
        task = bars.add_task(title, total=None)
        mark, style = "x", "red"
        try:
            yield lambda share: bars.update(task, total=1.0, completed=share)
            mark, style = "*", "green"
        finally:
            bars.remove_task(task)
            self._closed()
            self._line(mark, style, title, started)

    def _opened(self) -> Progress:
        with self._lock:
            self._stages += 1
            if self._bars is None:
                self._bars = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TimeElapsedColumn(),
                    console=self.console,
                    transient=True,
                    disable=not self.console.is_terminal,
                )
                self._bars.start()
            return self._bars

    def _closed(self) -> None:
        with self._lock:
            self._stages -= 1
            if self._bars is not None and not self._stages:
                self._bars.stop()
                self._bars = None

    def _line(self, mark: str, style: str, title: str, started: float) -> None:
        seconds = f"  {time.perf_counter() - started:.1f} s"
        self.console.print(Text.assemble("  ", (mark, style), f" {title}", (seconds, "dim")))
