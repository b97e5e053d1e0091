"""Artefacts are made side by side, measured alone, and what was verified survives Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from castling_deploy.errors import CheckpointError, CrashError
from castling_deploy.isolation import IN_PROCESS, Worker, Workers
from castling_deploy.making import Finish, Result
from castling_deploy.request import Step
from castling_deploy.side_by_side import Task, default_jobs, side_by_side
from castling_deploy.target import Precision, effort_of, target_named

GIB = 2**30


def result(name: str) -> Result:
    return Result(Step(target_named(name), Precision.FP32, None))


def endless(workers: Workers, ended: list[str], begun: Callable[[], None]) -> Callable[[], Finish]:
    """What waits for a process that does not end by itself, and notes the error that ended it."""

    def make() -> Finish:
        with Worker() as worker:
            workers.add(worker)
            begun()
            try:
                worker.call("sleep", time.sleep, 600)
            except CrashError as error:
                ended.append(str(error))
                raise
        raise AssertionError("the process was not ended")

    return make


def never() -> Finish:
    raise AssertionError("nothing new is begun")


def test_results_keep_their_order_and_are_measured_one_by_one_when_all_are_made() -> None:
    making, measuring, most, events = 0, 0, 0, []
    lock = threading.Lock()

    def task(name: str, seconds: float) -> Callable[[], Finish]:
        def finish(measured: bool) -> Result:
            nonlocal measuring
            assert measured and not making and not measuring
            measuring += 1
            events.append(name)
            measuring -= 1
            return result(name)

        def make() -> Finish:
            nonlocal making, most
            with lock:
                making += 1
                most = max(most, making)
            time.sleep(seconds)
            with lock:
                making -= 1
            return finish

        return make

    tasks = [Task(task("onnx", 0.3)), Task(task("coreml", 0.01)), Task(task("executorch", 0.1))]
    results = side_by_side(tasks, 2, Workers(), measured=True)
    assert [one.step.target.name for one in results] == events == ["onnx", "coreml", "executorch"]
    assert most == 2


def test_the_longest_is_begun_first() -> None:
    begun = []

    def task(name: str) -> Callable[[], Finish]:
        def make() -> Finish:
            begun.append(name)
            return lambda measured: result(name)

        return make

    names = ["onnx", "coreml", "executorch"]
    tasks = [Task(task(name), effort_of(target_named(name))) for name in names]
    results = side_by_side(tasks, 1, Workers(), measured=True)
    assert [one.step.target.name for one in results] == names and begun == ["executorch", "coreml", "onnx"]


@pytest.mark.parametrize(("jobs", "beside"), [(1, []), (2, ["executorch"]), (3, ["executorch", "onnx"])])
def test_early_ones_are_begun_beside_the_reference_which_is_one_of_the_jobs(jobs: int, beside: list[str]) -> None:
    begun: list[str] = []
    enough = threading.Event()

    def task(name: str) -> Callable[[], Finish]:
        def make() -> Finish:
            begun.append(name)
            if len(begun) == len(beside):
                enough.set()
            return lambda measured: result(name)

        return make

    def reference(begin: Callable[[], None]) -> None:
        assert not begun
        begin()
        assert not beside or enough.wait(10)
        assert sorted(begun) == beside

    tasks = [
        Task(task("coreml"), 3.0),
        Task(task("onnx"), 1.0, early=True),
        Task(task("executorch"), 2.0, early=True),
    ]
    results = side_by_side(tasks, jobs, Workers(), reference, measured=False)
    assert [one.step.target.name for one in results] == ["coreml", "onnx", "executorch"]


def test_a_reference_that_fails_ends_what_was_begun_beside_it(interruptible: None) -> None:
    workers, begun = Workers(), threading.Event()
    ended: list[str] = []

    def reference(begin: Callable[[], None]) -> None:
        begin()
        assert begun.wait(60)
        raise CheckpointError("the weights are damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        side_by_side(
            [Task(endless(workers, ended, begun.set), early=True), Task(never)], 2, workers, reference, measured=False
        )
    assert len(ended) == 1


@pytest.fixture
def interruptible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With processes; and tests that run in a shell's background are born with SIGINT ignored."""
    monkeypatch.delenv(IN_PROCESS, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_processes_and_keeps_what_was_verified(interruptible: None) -> None:
    workers, kept = Workers(), []
    ended: list[str] = []

    def verified() -> Finish:
        def finish(measured: bool) -> Result:
            kept.append(measured)
            return result("onnx")

        return finish

    def interrupted() -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    started = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        side_by_side(
            [Task(verified), Task(endless(workers, ended, interrupted)), Task(never)], 1, workers, measured=True
        )
    assert kept == [False] and len(ended) == 1 and "SIGKILL" in ended[0]
    assert threading.active_count() <= started + 1


def test_a_worker_that_comes_after_the_interrupt_does_nothing(interruptible: None) -> None:
    workers = Workers()
    workers.interrupt()
    with Worker() as worker:
        workers.add(worker)
        with pytest.raises(CrashError, match="interrupted"):
            worker.call("sleep", time.sleep, 600)


def test_large_networks_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IN_PROCESS, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    memory = type("Memory", (), {"available": 16 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert default_jobs(10_000_000, 5) == 4
    assert default_jobs(10_000_000, 2) == 2
    assert default_jobs(350_000_000, 5) == 2
    assert default_jobs(4_000_000_000, 5) == 1
    monkeypatch.setenv(IN_PROCESS, "1")
    assert default_jobs(10_000_000, 5) == 1
