"""Several artefacts at the same time, each in a thread that waits for its processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import psutil

from castling_deploy.isolation import IN_PROCESS, Workers
from castling_deploy.making import Finish, Result

# An export's peak, with room to spare: Castling-DeiT-B (346 MB of weights) takes less than 4 GB to ONNX.
EXPORT_BYTES, EXPORT_PER_WEIGHT_BYTE = 2 * 2**30, 16


def default_jobs(weight_bytes: int, count: int) -> int:
    """How many of `count` artefacts are made at once: as many as there are cores, and as memory allows."""
    if os.environ.get(IN_PROCESS):
        return 1  # where a toolchain's noise is held back, nobody else may print
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    need = EXPORT_BYTES + EXPORT_PER_WEIGHT_BYTE * weight_bytes
    return max(1, min(count, cores, int(psutil.virtual_memory().available // need)))


def side_by_side(
    tasks: Sequence[Callable[[], Finish]],
    jobs: int,
    workers: Workers,
    *,
    measured: bool,
    efforts: Sequence[float] | None = None,
) -> tuple[Result, ...]:
    """The artefacts of `tasks` in order: `jobs` of them made at a time, then measured one by one, alone.

    Those of the largest of `efforts` are begun first, so that none is left to end alone.
    On Ctrl-C their processes are ended, and what was verified by then is kept without being measured.
    """
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool:
        order = sorted(range(len(tasks)), key=lambda index: -efforts[index] if efforts else 0)
        submitted = {index: pool.submit(tasks[index]) for index in order}
        futures = [submitted[index] for index in range(len(tasks))]
        try:
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
