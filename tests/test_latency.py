"""The statistics of latency, on a clock of our own: nothing here depends on how fast this machine is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from castling_deploy.console import print_doubts
from castling_deploy.latency import MAX_ROUNDS, MIN_ROUNDS, WARMUP_RUNS, LatencyReport, Timing, doubts, interleaved
from castling_deploy.making import Result
from castling_deploy.request import Step
from castling_deploy.target import Precision, target_named


class FakeClock:
    """Advances only when a subject runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def subject(self, name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run() -> None:
            self.order.append(name)
            self.now += seconds

        return run


def test_subjects_are_timed_in_turn_after_a_warm_up() -> None:
    clock = FakeClock()
    timings = interleaved({"a": clock.subject("a", 0.01), "b": clock.subject("b", 0.02)}, clock)
    assert timings["a"].median_s == pytest.approx(0.01) and timings["b"].median_s == pytest.approx(0.02)
    rounds = len(timings["a"].times_s)
    assert clock.order[-2 * rounds :] == ["a", "b"] * rounds
    assert clock.order.count("a") - rounds >= WARMUP_RUNS


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-5, MAX_ROUNDS), (10, MIN_ROUNDS)])
def test_rounds_stay_within_their_bounds(seconds: float, rounds: int) -> None:
    clock = FakeClock()
    assert len(interleaved({"a": clock.subject("a", seconds)}, clock)["a"].times_s) == rounds


def test_the_tail_is_kept() -> None:
    timing = Timing((1.0,) * 90 + (10.0,) * 10)
    assert (timing.median_s, timing.p95_s, timing.min_s) == (1.0, 10.0, 1.0)


def test_doubt_is_said_in_words() -> None:
    found = doubts({"x": Timing((1.0,) * 9 + (5.0,))})
    assert any("noisy" in text for text in found) and any("only 10 runs" in text for text in found)


def test_the_ratio_is_taken_pair_by_pair() -> None:
    report = LatencyReport("x", Timing((1.0, 2.0, 30.0)), Timing((2.0, 4.0, 60.0)), 1, 1, {}, ())
    assert report.ratio == 0.5


def test_a_noisy_machine_is_one_line_for_all_targets() -> None:
    text = io.StringIO()
    timing = Timing((1.0, 1.0))
    noisy = LatencyReport("x", timing, timing, 1, 1, {}, ("x: p95 is 3 x the median", "load average 9 on 2 cores"))
    results = [Result(Step(target_named(name), Precision.FP32, None), latency=noisy) for name in ("onnx", "executorch")]
    print_doubts(results, Console(file=text, width=110))
    (line,) = text.getvalue().strip().splitlines()
    assert line.startswith("! the latency of onnx, executorch is rough: load average 9 on 2 cores")
