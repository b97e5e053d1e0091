"""Somebody else's native code runs in a process of its own, within limits of time and memory.

A toolchain or a runtime that crashes, hangs or eats the memory ends its process, and the caller gets a CrashError that
names what happened. It also makes Ctrl-C safe: the caller waits in Python, and kills the worker with all it started.

A worker is never a fork of its caller (OpenMP's threads do not survive one) nor multiprocessing's spawn (which runs the
user's script again): it is forked from a process that has only loaded torch (`forking.py`), or is a fresh interpreter.
Large arrays travel through a file that both sides map, not through the pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import pickle
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from castling_deploy.errors import CastlingError, CrashError
from castling_deploy.forking import Forked, forked, interpreter, ready, surroundings_of_workers
from castling_deploy.progress import Advance
from castling_deploy.quiet import tail
from castling_deploy.scratch import Scratch

T = TypeVar("T")
POLL_S = 0.1
IN_PROCESS = "CASTLING_IN_PROCESS"  # set, jobs run in the caller's process: for debuggers, and without any limit
ALIGNMENT = 64  # bytes, of every array in a job's file
START = "from castling_deploy.isolation import serve; serve({descriptor})"


@dataclass(frozen=True)
class Limits:
    """What one call may take: `seconds` of wall clock, and memory in bytes of the process and what it started."""

    seconds: float = 1800.0
    memory_bytes: int | None = None

    @property
    def memory(self) -> int:
        """The limit in bytes: what was asked for, or nine tenths of what the machine has."""
        import psutil

        return self.memory_bytes or int(psutil.virtual_memory().total * 0.9)


class Worker:
    """A process that runs functions of modules, one at a time. It starts at once, and loads torch while nobody waits.

    After a crash the next call starts another one. Close it, or use it in a `with` block.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._scratch = Scratch()
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._interrupted = False
        self._in_process = bool(os.environ.get(IN_PROCESS))
        if not self._in_process:
            self._start()

    def _start(self) -> None:
        self._log = open(self._scratch.path / "log", "w+b")  # noqa: SIM115  # closed in _stop
        ours, theirs = Pipe()
        scratch = str(self._scratch.path)  # it is killed, and removes nothing by itself
        environment = {**surroundings_of_workers(), "TMPDIR": scratch}
        self._process = forked(theirs.fileno(), self._log.fileno(), self._scratch.path, environment)
        self._process = self._process or interpreter(START, theirs.fileno(), self._log.fileno(), environment)
        theirs.close()
        self._connection = ours

    def call(self, subject: str, function: Callable[..., T], *arguments: Any, advance: Advance | None = None) -> T:
        """`function(*arguments)` there, with `advance=` where it is wanted here. `subject` begins what a crash says.

        `function` and the arguments are pickled. Raises CrashError for a crash, a time-out or too much memory, and
        whatever error of this project the function raises.
        """
        if self._in_process:
            return here(subject, function, *arguments, advance=advance)
        if self._interrupted:
            raise CrashError(f"{subject}: interrupted")
        if self._process is None:
            self._start()
        job = self._scratch.path / "job"
        _write(job, (function.__module__, function.__qualname__, arguments, advance is not None))
        try:
            return self._call(subject, job, advance)
        except BaseException as error:
            if isinstance(error, CrashError) or not isinstance(error, Exception):
                self._stop()
            raise

    def _call(self, subject: str, job: Path, advance: Advance | None) -> Any:
        assert self._process is not None
        deadline = time.monotonic() + self._limits.seconds
        memory = self._limits.memory
        try:
            self._connection.send(str(job))
            while True:
                if self._connection.poll(POLL_S):
                    kind, value = self._connection.recv()
                    if kind == "done":
                        return _read(Path(value))
                    if kind == "error":
                        raise pickle.loads(value)
                    if advance is not None:
                        advance(value)
                if time.monotonic() > deadline:
                    raise CrashError(
                        f"{subject}: not finished after {self._limits.seconds:g} s",
                        hint="allow more with --timeout, or try a smaller network",
                        how="timeout",
                    )
                if _memory_of(self._process.pid) > memory:
                    raise CrashError(
                        f"{subject}: more than {memory / 2**30:.1f} GiB of memory",
                        hint="allow more with --memory, or try a smaller input",
                        how="memory",
                    )
        except (EOFError, ConnectionError, BrokenPipeError):
            code = self._process.wait()
            words = tail(self._log)
            raise CrashError(
                f"{subject}: its process {_ended(code)}", hint=f"its last words:\n{words}" if words else None
            ) from None

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._connection.close()
        self._log.close()

    def interrupt(self) -> None:
        """End the process from another thread: the call that waits for it fails, and so does every other one."""
        self._interrupted = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and whatever it started."""
        self._stop()
        self._scratch.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prepare() -> None:
    """Have ready what workers start from, for a caller that has something else to do before it needs the first."""
    if not os.environ.get(IN_PROCESS):
        ready()


class Workers:
    """Those that end together, whichever thread started them."""

    def __init__(self) -> None:
        self._all: list[Worker] = []
        self._interrupted = False

    def add(self, worker: Worker) -> None:
        """One more, which is ended at once where the others were."""
        self._all.append(worker)
        if self._interrupted:
            worker.interrupt()

    def interrupt(self) -> None:
        """See `Worker.interrupt`."""
        self._interrupted = True
        for worker in self._all:
            worker.interrupt()


class Call(Protocol):
    """`Worker.call`, or `here`: how a job is run."""

    def __call__(self, subject: str, function: Callable[..., T], *arguments: Any, advance: Advance | None = None) -> T:
        """See `Worker.call`."""


def here(subject: str, function: Callable[..., T], *arguments: Any, advance: Advance | None = None) -> T:
    """The job in this process, without limits: a crash is the caller's own."""
    return function(*arguments, advance=advance) if advance is not None else function(*arguments)


def isolated(
    subject: str, function: Callable[..., T], *arguments: Any, advance: Advance | None = None, limits: Limits
) -> T:
    """`Worker.call` in a process for this one call."""
    with Worker(limits) as worker:
        return worker.call(subject, function, *arguments, advance=advance)


def serve(descriptor: int) -> None:
    """The worker's side: run jobs until the caller is gone."""
    import faulthandler

    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    jobs: list[str] = []
    arrived = threading.Semaphore(0)

    def listen() -> None:
        while True:
            try:
                jobs.append(connection.recv())
            except (EOFError, OSError):
                os.killpg(0, signal.SIGKILL)  # the caller is gone: nobody wants the answer, nor what was started for it
            arrived.release()

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
    while True:
        arrived.acquire()
        _serve_one(connection, Path(jobs.pop()))


def _serve_one(connection: Connection, job: Path) -> None:
    try:
        module, name, arguments, wants_progress = _read(job)
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        told = {"advance": lambda share: connection.send(("advance", share))} if wants_progress else {}
        result = job.with_name("result")
        _write(result, function(*arguments, **told))
        connection.send(("done", str(result)))
    except BaseException as error:
        connection.send(("error", _picklable(error)))


def _picklable(error: BaseException) -> bytes:
    """An error of ours or of the disk as it is, any other as a CrashError that names it."""
    if isinstance(error, (CastlingError, OSError)):
        with contextlib.suppress(Exception):
            return pickle.dumps(error.with_traceback(None))
    said = f"{type(error).__name__}: {str(error).strip()[:500]}"
    return pickle.dumps(CrashError(said, hint=None, how="error"))


def _write(path: Path, value: Any) -> None:
    """Pickle `value` into a file, its arrays beside the pickle and not inside."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    with open(path, "wb") as file:
        file.write(struct.pack(f"<{len(raws) + 2}Q", len(raws), len(data), *(raw.nbytes for raw in raws)))
        file.write(data)
        for raw in raws:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.write(raw)


def _read(path: Path) -> Any:
    """What `_write` wrote. Its arrays are views of the file, private and writable."""
    with open(path, "rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    path.unlink()  # the mapping keeps the bytes
    (count,) = struct.unpack_from("<Q", whole)
    length, *sizes = struct.unpack_from(f"<{count + 1}Q", whole, 8)
    start = 8 * (count + 2)
    data, position, buffers = whole[start : start + length], start + length, []
    for size in sizes:
        position += -position % ALIGNMENT
        buffers.append(whole[position : position + size])
        position += size
    return pickle.loads(data, buffers=buffers)


def _memory_of(pid: int) -> int:
    """Resident bytes of a process and of everything it started."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        total = 0
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
        return total
    return 0


def _ended(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" if name in ("SIGKILL", "SIGTERM") else f"crashed with {name}"
    return f"ended with exit code {code}"
