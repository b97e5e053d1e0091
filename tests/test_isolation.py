"""Workers: arrays there and back, errors, crashes, limits, and nothing left running."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from torch import nn

from castling_deploy.errors import CrashError, ParityError
from castling_deploy.isolation import IN_PROCESS, Limits, Worker


def doubled(values: npt.NDArray[np.float32], advance: Callable[[float], None]) -> dict[str, npt.NDArray[np.float32]]:
    advance(0.5)
    values *= 2
    return {"doubled": values}


def weight_of(module: nn.Linear) -> float:
    return module.weight.sum().item()


def process_number() -> int:
    return os.getpid()


def raise_ours() -> None:
    raise ParityError("not equal", hint="look again")


def raise_theirs() -> None:
    raise ValueError("a library's own")


def crash() -> None:
    print("these are the last words", flush=True)
    ctypes.string_at(0)


def leave() -> None:
    os._exit(7)


def sleep() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=False)


def eat() -> None:
    eaten = []
    while True:
        eaten.append(np.ones(2**24))
        time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def isolated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(IN_PROCESS, raising=False)
        yield


@pytest.fixture(scope="module")
def worker(isolated: None) -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


def test_arrays_go_there_and_back(worker: Worker) -> None:
    values = np.arange(1000, dtype=np.float32).reshape(10, 100)
    shares: list[float] = []
    result = worker.call("double", doubled, values, advance=shares.append)
    np.testing.assert_array_equal(result["doubled"], 2 * np.arange(1000, dtype=np.float32).reshape(10, 100))
    assert shares == [0.5]
    assert values.flat[1] == 1  # the caller's own array is not the worker's


def test_modules_go_there(worker: Worker) -> None:
    module = nn.Linear(3, 3)
    assert worker.call("sum", weight_of, module) == pytest.approx(module.weight.sum().item())


def test_one_process_serves_many_calls(worker: Worker) -> None:
    assert worker.call("pid", process_number) == worker.call("pid", process_number) != os.getpid()


def test_an_error_of_ours_comes_back_whole(worker: Worker) -> None:
    with pytest.raises(ParityError, match="not equal") as caught:
        worker.call("compare", raise_ours)
    assert caught.value.hint == "look again" and caught.value.exit_code == 3


def test_an_error_of_a_library_comes_back_by_name(worker: Worker) -> None:
    with pytest.raises(CrashError, match="ValueError: a library's own") as caught:
        worker.call("build", raise_theirs)
    assert caught.value.how == "error"


@pytest.mark.parametrize(("function", "said"), [(crash, "crashed with SIGSEGV"), (leave, "exit code 7")])
def test_a_crash_has_a_name_and_the_next_call_works(function: Callable[[], None], said: str) -> None:
    with Worker() as worker:
        with pytest.raises(CrashError, match=f"build: its process .*{said}") as caught:
            worker.call("build", function)
        assert caught.value.how == "crash"
        if function is crash:
            assert "these are the last words" in str(caught.value.hint)
        assert worker.call("pid", process_number)


def test_a_call_that_hangs_is_ended_with_all_it_started() -> None:
    with Worker(Limits(seconds=3)) as worker:
        first = worker.call("pid", process_number)
        with pytest.raises(CrashError, match="build: not finished after 3 s") as caught:
            worker.call("build", sleep)
        assert caught.value.how == "timeout"
        assert not psutil.pid_exists(first)
    assert not [one for one in psutil.process_iter(["cmdline"]) if "time.sleep(600)" in (one.info["cmdline"] or [])]


def test_a_call_that_eats_the_memory_is_ended() -> None:
    with Worker(Limits(memory_bytes=2**30)) as worker, pytest.raises(CrashError, match=r"more than 1\.0 GiB") as caught:
        worker.call("build", eat)
    assert caught.value.how == "memory"


def test_a_worker_ends_with_its_caller() -> None:
    code = (
        "import os; from castling_deploy.isolation import Worker; from os import getpid\n"
        "worker = Worker(); print(worker._process.pid, flush=True); os.kill(getpid(), 9)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(out)) or psutil.Process(int(out)).status() == psutil.STATUS_ZOMBIE
