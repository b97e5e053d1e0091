"""Workers are forked from one process that has loaded torch, where that is safe: on Linux.

Loading torch and what traces a network with it takes 4 s of CPU, and an export to five targets starts ten workers. This
process has run nothing else, and its only thread waits: no OpenMP, of which a fork would lose the threads. Toolchains
are not loaded in it: what they do to a process, they do to their own worker. Where it does not come up, or is not for
this system, workers start as fresh interpreters.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

START = (
    "from castling_deploy.forking import born; connection = born({descriptor}); "
    "from castling_deploy.isolation import serve; serve(connection)"
)
RUN = ("castling_deploy.making", "castling_deploy.verification")  # by workers, who are told by name
START_S = 60.0  # after which the caller goes on without
# What of the environment no library reads when it is loaded: pytest writes the first before every test.
UNREAD = ("PYTEST_CURRENT_TEST", "TMPDIR")
NUMBER = struct.Struct("<i")  # what the two sides say to each other: a process's number, and how it ended


class Forked:
    """A worker, as `subprocess.Popen` shows one: `pid`, and `wait`."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        (self.pid,) = NUMBER.unpack(line.recv(NUMBER.size))
        line.settimeout(None)
        self._code: int | None = None

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it. Nobody has its number before this."""
        if self._code is None:
            with self._line as line:
                said = line.recv(NUMBER.size)
                self._code = NUMBER.unpack(said)[0] if said else -signal.SIGKILL
                with suppress(OSError):  # where who reaps it was killed too
                    line.shutdown(socket.SHUT_WR)
                    line.recv(1)  # the end: it is reaped
        return self._code


class Server:
    """The process that forks, as its caller sees it."""

    def __init__(self, surroundings: object) -> None:
        self.surroundings = surroundings
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = interpreter(START, theirs.fileno(), subprocess.DEVNULL, surroundings_of_workers())

    def forked(self, connection: int, log: int, folder: Path, environment: dict[str, str]) -> Forked:
        """A worker that serves `connection` and writes to `log`. Raises OSError or struct.error where there is none."""
        order = folder / "order"
        order.write_bytes(pickle.dumps((environment, os.getcwd())))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(START_S)
        try:
            with theirs:
                socket.send_fds(self._line, [os.fsencode(order)], [connection, log, theirs.fileno()])
            return Forked(ours)
        except BaseException:
            ours.close()
            raise

    @property
    def killed(self) -> bool:
        """Whether somebody did."""
        return (self._process.poll() or 0) < 0

    def close(self) -> None:
        """It ends with the last of its workers."""
        self._line.close()


_server: Server | None = None
_lock = threading.Lock()


def ready() -> Server | None:
    """The process that forks; it is started where there is none, and loads torch while nobody waits.

    What libraries read when they are loaded must not have changed since: for another environment or path there is
    another process. One that ended by itself found that it cannot fork here, and one that was killed is replaced.
    """
    global _server
    if not hasattr(os, "pidfd_open"):
        return None
    environment = {name: value for name, value in os.environ.items() if name not in UNREAD}
    surroundings = (os.getpid(), searched(), environment)
    with _lock:
        if _server is None or _server.surroundings != surroundings or _server.killed:
            if _server is not None:
                _server.close()
            _server = Server(surroundings)
        return _server


def surroundings_of_workers() -> dict[str, str]:
    """The environment that workers are born in: one thread each, unless the user says otherwise.

    Several work side by side. With two threads each on two cores, the bundled network goes to five targets in 50.9 s,
    with one each in 44.1.
    """
    return {"OMP_NUM_THREADS": "1", **os.environ}


def interpreter(code: str, descriptor: int, output: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A fresh interpreter that runs `code`, in which `{descriptor}` stands for one that it inherits. Both streams go
    to `output`.
    """
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {searched()!r}; {code.format(descriptor=descriptor)}"],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(descriptor,),
        env=environment,
        start_new_session=True,  # so that Ctrl-C reaches the caller alone, and a kill reaches all it started
    )


def forked(connection: int, log: int, folder: Path, environment: dict[str, str]) -> Forked | None:
    """See `Server.forked`; None where a worker has to start as a fresh interpreter."""
    with suppress(OSError, struct.error):
        server = ready()
        return None if server is None else server.forked(connection, log, folder, environment)
    return None


def born(descriptor: int) -> int:
    """The forking side, until the caller is gone, and every worker. It returns in the workers: what each serves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(os.pidfd_open(os.getpid()))  # an old kernel has none
    load()
    if threading.active_count() > 1:
        sys.exit()  # a fork would lose them
    gc.disable()
    gc.freeze()  # nobody's garbage, and no page of it is copied to look
    orders = socket.socket(fileno=descriptor)
    workers: dict[int, tuple[int, socket.socket]] = {}  # number and line to the caller, by what can be waited for
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while orders.fileno() >= 0 or workers:
        for ready, _ in poll.poll():
            if ready != descriptor:
                pid, line = workers.pop(ready)
                poll.unregister(ready)
                if ready == line.fileno():
                    os.waitpid(pid, 0)
                    line.close()
                    continue
                os.close(ready)
                _say(line, _ended(pid))
                waited = line.fileno()  # its number is given to nobody else before the caller has heard
            else:
                order, files, _, _ = socket.recv_fds(orders, 4096, 3)
                if not order:  # the caller is gone
                    poll.unregister(orders)
                    orders.close()
                    continue
                connection, log, end = files
                line = socket.socket(fileno=end)
                pid = os.fork()
                if pid == 0:
                    _forget([orders, line, *(line for _, line in workers.values())], workers)
                    _settle(Path(os.fsdecode(order)), log)
                    return connection
                os.setpgid(pid, pid)  # here too: whoever comes first, it is done before the caller knows the number
                os.close(connection)
                os.close(log)
                _say(line, pid)
                waited = os.pidfd_open(pid)
            workers[waited] = pid, line
            poll.register(waited, select.POLLIN)
    sys.exit()


def _forget(lines: Iterable[socket.socket], waited: Iterable[int]) -> None:
    """In a worker: close what is the server's own. A line that stayed open would hide the end of the other side."""
    for line in lines:
        line.close()
    for one in waited:
        with suppress(OSError):  # a line
            os.close(one)


def _ended(pid: int) -> int:
    """As `Forked.wait` returns it."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _say(line: socket.socket, number: int) -> None:
    with suppress(OSError):  # the caller is gone
        line.send(NUMBER.pack(number))


def _settle(order: Path, log: int) -> None:
    """In a worker: take over the surroundings of whoever wants it."""
    os.setpgid(0, 0)  # so that a kill reaches all it started
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    environment, folder = pickle.loads(order.read_bytes())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # it is asked for again
    gc.enable()


def load() -> None:
    """torch, what traces a network, and what of ours a worker runs."""
    import torch

    for module in RUN:
        import_module(module)
    torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),))


def searched() -> list[str]:
    """Where modules are looked for, without the folder that one happens to stand in."""
    return [entry for entry in sys.path if entry]
