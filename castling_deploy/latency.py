"""Latency: interleaved, after a warm-up, with every raw time kept and every doubt printed beside the number."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from castling_deploy.target import Witness, WitnessKind

WARMUP_S = 0.2  # per subject, and at least WARMUP_RUNS
WARMUP_RUNS = 5
MEASURE_S = 1.5  # per subject, within MIN_ROUNDS and MAX_ROUNDS
MIN_ROUNDS = 10
MAX_ROUNDS = 500


def timed(witness: Witness) -> bool:
    """Whether its time says something of the device: an emulator's, an evaluator's and an interpreter's do not."""
    return witness.kind in (WitnessKind.DEVICE, WitnessKind.RUNTIME) and not witness.interpreted


@dataclass(frozen=True)
class Timing:
    """Times of one subject in seconds, in the order they were taken."""

    times_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return float(np.median(self.times_s))

    @property
    def p95_s(self) -> float:
        return float(np.percentile(self.times_s, 95))

    @property
    def min_s(self) -> float:
        return min(self.times_s)


@dataclass(frozen=True)
class LatencyReport:
    """An artefact and the PyTorch reference, timed in turn in one run. `ratio` is the median of the pairwise ratios."""

    runtime: str
    artifact: Timing
    reference: Timing
    threads: int
    batch: int
    host: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return float(np.median(np.array(self.artifact.times_s) / np.array(self.reference.times_s)))


def interleaved(
    subjects: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> Mapping[str, Timing]:
    """Time the subjects in turn, A B A B ..., so that a machine that speeds up or slows down does it to all alike."""
    slowest = 0.0
    for subject in subjects.values():
        started, runs = clock(), 0
        while runs < WARMUP_RUNS or clock() - started < WARMUP_S:
            subject()
            runs += 1
        slowest = max(slowest, (clock() - started) / runs)
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, MEASURE_S / max(slowest, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            started = clock()
            subject()
            times[name].append(clock() - started)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def doubts(timings: Mapping[str, Timing]) -> tuple[str, ...]:
    """What makes these numbers doubtful, in words."""
    found = []
    for name, timing in timings.items():
        if timing.p95_s > 1.5 * timing.median_s:
            found.append(f"{name}: p95 is {timing.p95_s / timing.median_s:.1f} x the median; the machine is noisy")
        if len(timing.times_s) < 30:
            found.append(f"{name}: only {len(timing.times_s)} runs; p95 is rough")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.7 * cores:
        found.append(f"load average {load:.1f} on {cores} cores; other work ran at the same time")
    return tuple(found)


def host() -> Mapping[str, str]:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
