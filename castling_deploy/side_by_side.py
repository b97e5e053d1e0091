"""Several artefacts at the same time, each in a thread that waits for its processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil

from castling_deploy.isolation import IN_PROCESS, Workers
from castling_deploy.making import Finish, Result

# An export's peak, with room to spare: Castling-DeiT-B (346 MB of weights) takes less than 4 GB to ONNX.
EXPORT_BYTES, EXPORT_PER_WEIGHT_BYTE = 2 * 2**30, 16


@dataclass(frozen=True)
class Task:
    """An artefact to be made: how, how long that takes beside others (s), and whether the reference may still run."""

    make: Callable[[], Finish]
    effort: float = 0.0
    early: bool = False


def default_jobs(weight_bytes: int, count: int) -> int:
    """How many of `count` artefacts (or of them and their reference) are made at once: as many as there are cores, and
    as memory allows."""
    if os.environ.get(IN_PROCESS):
        return 1  # where a toolchain's noise is held back, nobody else may print
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    need = EXPORT_BYTES + EXPORT_PER_WEIGHT_BYTE * weight_bytes
    return max(1, min(count, cores, int(psutil.virtual_memory().available // need)))


def side_by_side(
    tasks: Sequence[Task],
    jobs: int,
    workers: Workers,
    reference: Callable[[Callable[[], None]], None] = lambda begin: begin(),
    *,
    measured: bool,
) -> tuple[Result, ...]:
    """The artefacts of `tasks` in order: `jobs` of them made at a time, then measured one by one, alone.

    Before, `reference(begin)` runs here, and counts as one of the jobs: once it calls `begin`, early tasks are made
    beside it. The longest are begun first, so that none is left to end alone.
    On Ctrl-C their processes are ended, and what was verified by then is kept without being measured.
    """
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool:
        order = sorted(range(len(tasks)), key=lambda index: -tasks[index].effort)
        submitted: dict[int, Future[Finish]] = {}
        futures: list[Future[Finish]] = []

        def begin(which: Sequence[int]) -> None:
            submitted.update({index: pool.submit(tasks[index].make) for index in which if index not in submitted})
            futures[:] = [submitted[index] for index in sorted(submitted)]

        try:
            reference(partial(begin, [index for index in order if tasks[index].early][: jobs - 1]))
            begin(order)
            finishes = [future.result() for future in futures]
            for finish in finishes:
                results.append(finish(measured))
        except BaseException:
            workers.interrupt()
            pool.shutdown(cancel_futures=True)
            _keep(futures[len(results) :])
            raise
    return tuple(results)


def _keep(futures: Sequence[Future[Finish]]) -> None:
    for future in futures:
        if not future.cancelled() and future.exception() is None:
            with suppress(Exception):  # the one that was being measured has no folder any more
                future.result()(False)
