"""A verdict that decides nothing says why: which of the numbers it was, and what that means."""

from __future__ import annotations

import numpy as np
import pytest

from castling_deploy.parity import (
    TOLERANCES,
    Failure,
    OutputParity,
    ParityReport,
    Reference,
    Rung,
    Verdict,
    WitnessReport,
    compare,
)
from castling_deploy.target import Precision, Witness, WitnessKind
from castling_deploy.undecided import output_undecided, why_undecided

FP32 = TOLERANCES[Precision.FP32]
NORMAL = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def compared(reference: Reference, error: float = 0.0) -> OutputParity:
    actual = reference.outputs + np.float32(error * reference.spread)
    return compare("logits", actual, reference, FP32, reference.power(FP32), reference.widest_limit(FP32))


def report(*outputs: OutputParity, failure: Failure | None = None, rungs: tuple[Rung, ...] = ()) -> ParityReport:
    seen = WitnessReport(Witness("x", WitnessKind.RUNTIME), outputs, None, FP32.limit, 12, failure)
    return ParityReport(Precision.FP32, 12, rungs, (seen,))


ALIKE = NORMAL.copy()
ALIKE[:6] = ALIKE[0] + np.arange(6, dtype=np.float32)[:, None] * 1e-7
CASES = {
    "rounding makes the error": (compared(Reference(NORMAL, 12, noise=3e-3), 5e-3), "multiplies rounding errors"),
    "rounding hides the images": (compared(Reference(NORMAL, 12, noise=2.0)), "come to 2e+00 of the spread"),
    "all images say the same": (compared(Reference(np.ones((6, 5), np.float32), 6, 1e-7)), "the same output"),
    "many images say the same": (compared(Reference(ALIKE, 12, 1e-7)), "too alike: 77% of their pairs"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_inconclusive_report_says_which_number_left_it_open(name: str) -> None:
    output, words = CASES[name]
    assert output.verdict is Verdict.INCONCLUSIVE
    assert words in str(why_undecided(report(output)))


def test_a_single_image_is_told_from_images_that_are_alike() -> None:
    single = compared(Reference(NORMAL[:1], 1, 1e-7))
    assert single.verdict is Verdict.INCONCLUSIVE
    assert "a single real image" in output_undecided(single, FP32.limit, real=1)


def test_a_limit_of_time_and_an_open_step_are_reasons_too() -> None:
    good = compared(Reference(NORMAL, 12, noise=1e-7))
    assert why_undecided(report(failure=Failure("timeout", "not finished after 3 s"))) == "not finished after 3 s"
    fold = Rung("fold", 2e-9, 1e-9, Verdict.INCONCLUSIVE)
    assert str(why_undecided(report(good, rungs=(fold,)))).startswith("the step 'fold': rounding alone")


def test_a_pass_and_a_failure_have_no_such_reason() -> None:
    reference = Reference(NORMAL, 12, noise=1e-7)
    assert why_undecided(report(compared(reference))) is None
    assert why_undecided(report(compared(reference, error=1.0), compared(Reference(ALIKE, 12, 1e-7)))) is None
