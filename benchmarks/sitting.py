"""One sitting: one core, everything timed in turn, ratios of pairs with their intervals, and the machine described."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from castling_deploy.latency import Timing, host, interleaved

PACKAGES = ("torch", "onnxruntime", "executorch", "openvino", "castling-deploy")


@dataclass(frozen=True)
class Ratio:
    """Times of `name` over those of `against`, pair by pair: median, and the order statistics that hold the true
    median in 95 of 100 sittings. `must` and `aim` are what it was to reach, None where nothing was said."""

    question: str
    name: str
    against: str
    ratio: float
    low: float
    high: float
    median_s: float
    against_s: float
    pairs: int
    must: float | None = None
    aim: float | None = None
    is_time: bool = True  # or bytes

    @property
    def reached(self) -> str:
        if self.must is None:
            return ""
        return "aim" if self.aim is not None and self.ratio <= self.aim else "yes" if self.ratio <= self.must else "NO"


def one_core() -> int:
    """Pin this process to the last core it may use; the others have the machine's own work. Returns the core."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def timings(subjects: Mapping[str, Callable[[], object]]) -> Mapping[str, Timing]:
    """All subjects in turn."""
    return interleaved(subjects)


def ratio(
    question: str,
    name: str,
    against: str,
    found: Mapping[str, Timing],
    must: float | None = None,
    aim: float | None = None,
) -> Ratio:
    """How long `name` takes where `against` takes 1."""
    one, other = np.array(found[name].times_s), np.array(found[against].times_s)
    pairs = np.sort(one / other)
    count = len(pairs)
    reach = int(np.ceil(0.98 * np.sqrt(count)))  # 1.96 sqrt(n / 4), the normal approximation of the binomial
    low, high = pairs[max(0, count // 2 - reach)], pairs[min(count - 1, count // 2 + reach)]
    return Ratio(
        question,
        name,
        against,
        float(np.median(pairs)),
        float(low),
        float(high),
        found[name].median_s,
        found[against].median_s,
        count,
        must,
        aim,
    )


def peak_bytes(program: str, *arguments: str) -> int:
    """What `program` (a script beside this one) prints last: the peak of its memory, above what it had before."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def environment(core: int) -> Mapping[str, object]:
    """What the numbers depend on."""
    return {
        **host(),
        "core": core,
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def table(ratios: list[Ratio]) -> str:
    """Markdown."""
    lines = [
        "| | over | ratio | 95 % | must | aim | reached | median | pairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in ratios:
        must, aim = ("" if number is None else f"{number:.2f}" for number in (each.must, each.aim))
        value = f"{each.median_s * 1e3:.2f} ms" if each.is_time else f"{each.median_s / 1e6:.0f} MB"
        lines.append(
            f"| {each.question}: {each.name} | {each.against} | {each.ratio:.3f} | {each.low:.3f} to {each.high:.3f} "
            f"| {must} | {aim} | {each.reached} | {value} | {each.pairs} |"
        )
    return "\n".join(lines)


def as_document(ratios: list[Ratio]) -> list[dict[str, object]]:
    return [{**asdict(each), "reached": each.reached} for each in ratios]
