"""Workers are forked from a process that has loaded torch, in the surroundings of whoever wants them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from castling_deploy import forking
from castling_deploy.errors import CrashError
from castling_deploy.forking import Forked
from castling_deploy.isolation import IN_PROCESS, Worker, prepare

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="workers are forked on Linux")


@pytest.fixture(scope="module", autouse=True)
def isolated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(IN_PROCESS, raising=False)
        yield


def loaded() -> bool:
    return "torch" in sys.modules and "torch._dynamo" in sys.modules


def no_toolchain() -> bool:
    return {"onnxruntime", "coremltools", "executorch", "coreai", "tensorrt_rtx"}.isdisjoint(sys.modules)


def surroundings(name: str) -> tuple[str | None, str]:
    return os.environ.get(name), os.getcwd()


def test_a_worker_is_born_with_torch_and_without_toolchains() -> None:
    with Worker() as worker:
        assert isinstance(worker._process, Forked)
        assert worker.call("look", loaded)
        assert worker.call("look", no_toolchain)


def test_a_worker_has_the_surroundings_of_its_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare()
    monkeypatch.setenv("CASTLING_TEST", "seen")
    monkeypatch.chdir(tmp_path)
    with Worker() as worker:
        assert isinstance(worker._process, Forked)
        assert worker.call("look", surroundings, "CASTLING_TEST") == ("seen", str(tmp_path))
    monkeypatch.delenv("CASTLING_TEST")
    with Worker() as worker:
        assert worker.call("look", surroundings, "CASTLING_TEST") == (None, str(tmp_path))


def test_workers_of_one_process_end_one_by_one() -> None:
    with Worker() as first, Worker() as second:
        with pytest.raises(CrashError, match="exit code 7"):
            first.call("leave", os._exit, 7)
        assert second.call("pid", os.getpid) != first.call("pid", os.getpid)


def test_the_number_of_a_worker_that_died_is_given_to_nobody_before_its_caller_knows() -> None:
    with Worker() as worker:
        process = worker._process
        assert process is not None
        os.kill(process.pid, 9)
        time.sleep(0.5)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert process.wait() == process.wait() == -9
        assert not psutil.pid_exists(process.pid)


def test_where_nothing_can_be_forked_a_worker_is_a_fresh_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with Worker() as worker:
        assert isinstance(worker._process, subprocess.Popen)
        assert worker.call("pid", os.getpid) == worker._process.pid


def test_the_process_that_forks_is_started_again_where_it_was_killed() -> None:
    server = forking.ready()
    with Worker() as orphan:
        assert server is not None
        server._process.kill()
        server._process.wait()
        assert orphan.call("pid", os.getpid)
        with Worker() as worker:
            assert isinstance(worker._process, Forked)
            assert worker.call("pid", os.getpid) == worker._process.pid


def test_a_worker_is_a_fresh_interpreter_where_the_process_that_forks_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "START", "{descriptor}; sys.exit()")
    monkeypatch.setenv("CASTLING_TEST", "another process")
    with Worker() as worker:
        assert isinstance(worker._process, subprocess.Popen)
        assert worker.call("pid", os.getpid) == worker._process.pid


def test_the_process_that_forks_ends_with_its_caller() -> None:
    code = (
        "import os; from castling_deploy.isolation import Worker; from castling_deploy import forking\n"
        "worker = Worker(); print(forking.ready()._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(out)) or psutil.Process(int(out)).status() == psutil.STATUS_ZOMBIE
