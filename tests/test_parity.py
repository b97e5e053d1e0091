"""The verdict means something: errors are relative to the spread, and a comparison without power says so."""

from __future__ import annotations

import numpy as np
import pytest

from castling_deploy.parity import (
    MIN_POWER,
    TOLERANCES,
    Array,
    OutputParity,
    ParityReport,
    Reference,
    Rung,
    Tolerance,
    Verdict,
    WitnessReport,
    compare,
    top1_agreement,
)
from castling_deploy.target import Precision, Witness, WitnessKind

FP32, FP16 = TOLERANCES[Precision.FP32], TOLERANCES[Precision.FP16]


def reference(scale: float = 1.0, offset: float = 0.0, noise: float = 1e-7, count: int = 12) -> Reference:
    outputs = offset + scale * np.random.default_rng(0).normal(size=(count, 5))
    return Reference(outputs.astype(np.float32), real=count, noise=noise)


def judge(actual: Array, expected: Reference, tolerance: Tolerance = FP32) -> OutputParity:
    return compare("logits", actual, expected, tolerance, expected.power(tolerance))


def test_the_spread_is_the_median_distance_between_outputs_of_different_images() -> None:
    outputs = np.array([[0.0, 0], [1, 0], [0, 3]], np.float32)
    assert Reference(outputs, real=3, noise=0).spread == 3
    assert Reference(outputs, real=2, noise=0).spread == 1, "structured inputs do not count"


def test_equal_outputs_pass_with_full_power() -> None:
    expected = reference()
    parity = judge(expected.outputs, expected)
    assert (parity.verdict, parity.max_abs, parity.rel, parity.top1_agreement) == (Verdict.PASS, 0, 0, 1)
    assert parity.sqnr_db is None, "an infinite ratio is not a number that JSON knows"
    assert expected.power(FP32) == 1


@pytest.mark.parametrize("count", [2, 3, 12, 21, 41])
def test_below_the_widest_limit_the_comparison_has_power_enough_and_not_beyond(count: int) -> None:
    for noise in (0.0, 1e-3):
        expected = reference(noise=noise, count=count)
        widest = expected.widest_limit(FP32)
        assert widest > 0
        assert expected.power(Tolerance(widest * 0.999, FP32.epsilon)) >= MIN_POWER
        assert expected.power(Tolerance(widest * 1.001, FP32.epsilon)) < MIN_POWER
    assert reference(scale=0).widest_limit(FP32) == 0 and reference(count=1).widest_limit(FP32) == 0


@pytest.mark.parametrize(("rel", "verdict"), [(0.5e-4, Verdict.PASS), (1.5e-4, Verdict.FAIL)])
def test_the_limit_is_relative_to_the_spread_whatever_the_scale(rel: float, verdict: Verdict) -> None:
    for scale in (1e-3, 1.0, 1e4):
        expected = reference(scale, noise=1e-8)
        actual = expected.outputs.astype(np.float64)
        actual[3, 2] += rel * expected.spread
        assert judge(actual, expected).verdict is verdict
        assert judge(actual, expected).rel == pytest.approx(rel, rel=1e-3)


def test_an_output_far_from_the_others_is_measured_by_its_own_distance() -> None:
    near = np.random.default_rng(0).normal(size=(12, 5))
    expected = Reference(np.concatenate([near, near[:1] + 1000]), real=12, noise=1e-7)
    actual = expected.outputs.copy()
    actual[12, 0] += 0.01
    assert judge(actual, expected).rel == pytest.approx(1e-5, rel=1e-2)
    actual[0, 0] += 0.01
    assert judge(actual, expected).verdict is Verdict.FAIL, "a real image has no such excuse"


def test_an_offset_that_fools_a_tolerance_relative_to_the_value_is_caught() -> None:
    """Outputs around 1000 that differ by 0.01 between images: another image's output is within rtol 1e-4 of each."""
    expected = reference(scale=0.01, offset=1000, noise=1e-7)
    wrong = expected.outputs[::-1].copy()
    assert np.allclose(wrong, expected.outputs, rtol=1e-4)
    assert judge(wrong, expected).verdict is Verdict.FAIL


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_never_passes(bad: float) -> None:
    expected = reference()
    actual = expected.outputs.copy()
    actual[-1, -1] = bad
    assert judge(actual, expected).verdict is Verdict.FAIL


def test_a_wrong_shape_never_passes() -> None:
    expected = reference()
    assert judge(expected.outputs[:-1], expected).verdict is Verdict.FAIL
    assert judge(expected.outputs[:, :-1], expected).verdict is Verdict.FAIL


def test_a_network_that_says_the_same_of_every_image_is_inconclusive() -> None:
    expected = Reference(np.ones((6, 5), np.float32), real=6, noise=1e-7)
    assert expected.power(FP32) == 0
    assert judge(expected.outputs, expected).verdict is Verdict.INCONCLUSIVE


def test_outputs_that_differ_less_than_rounding_are_inconclusive_not_wrong() -> None:
    expected = reference(scale=1e-6, offset=1, noise=0.2)
    rounded = (expected.outputs + 3e-7).astype(np.float32)
    assert judge(rounded, expected).verdict is Verdict.INCONCLUSIVE
    noisier = reference(scale=1e-6, offset=1, noise=2)
    assert judge(noisier.outputs, noisier).verdict is Verdict.INCONCLUSIVE, "rounding hides one image from another"


def test_an_error_far_beyond_rounding_fails_however_badly_conditioned_the_network() -> None:
    expected = reference(scale=1.0, noise=1e-3)
    assert judge(-expected.outputs, expected).verdict is Verdict.FAIL


def test_nothing_compared_is_not_a_pass() -> None:
    empty = Reference(np.zeros((0, 5), np.float32), real=0, noise=0)
    assert judge(empty.outputs, empty).verdict is Verdict.INCONCLUSIVE
    assert Verdict.worst([]) is Verdict.INCONCLUSIVE
    assert WitnessReport(Witness("nobody", WitnessKind.REFERENCE), (), None).verdict is Verdict.INCONCLUSIVE


def test_fp16_is_judged_by_its_own_rounding() -> None:
    expected = reference(noise=1e-6)
    rounded = expected.outputs.astype(np.float16).astype(np.float32)
    assert judge(rounded, expected).verdict is Verdict.FAIL
    assert judge(rounded, expected, FP16).verdict is Verdict.PASS


def test_a_flip_counts_only_beyond_the_margin() -> None:
    expected = np.array([[1.0, 1.0 + 1e-5, 0], [3, 1, 0]])
    tie, clear = expected.copy(), expected.copy()
    tie[0] = [1.0 + 2e-5, 1.0, 0]
    clear[1] = [1, 3, 0]
    assert top1_agreement(tie, expected, bound=1e-5) == 1
    assert top1_agreement(clear, expected, bound=1e-5) == 0.5


def report(*rungs: Rung, verdict: Verdict = Verdict.PASS) -> ParityReport:
    output = OutputParity("logits", 1, 0, 1, 0, 0, 1, None, 1, verdict)
    witnesses = (WitnessReport(Witness("x", WitnessKind.RUNTIME), (output,), None),)
    return ParityReport(Precision.FP32, 10, rungs, witnesses)


def test_one_bad_rung_decides_and_an_open_cast_does_not() -> None:
    good, cast = Rung("fold", 0, 1e-9, Verdict.PASS), Rung("cast", 1, None, Verdict.INCONCLUSIVE)
    assert report(cast, good).verdict is Verdict.PASS
    assert report(Rung("cast", 1, None, Verdict.FAIL), good).verdict is Verdict.FAIL, "the cast harmed the task"
    assert report(cast, Rung("fold", 1, 1e-9, Verdict.FAIL)).verdict is Verdict.FAIL
    assert report(cast, good, verdict=Verdict.INCONCLUSIVE).verdict is Verdict.INCONCLUSIVE
    assert ParityReport(Precision.FP32, 0, (good,), ()).verdict is Verdict.INCONCLUSIVE
