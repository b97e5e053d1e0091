"""`castling verify --from`: the numbers of a parity.json with another limit, without running anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import castling
from exported import CLASSIFIER, exported

from castling_deploy.errors import UsageError
from castling_deploy.parity import TOLERANCES, Array, Reference, Tolerance, Verdict, compare
from castling_deploy.rechecking.rejudge import rejudge
from castling_deploy.target import Precision

FP32 = TOLERANCES[Precision.FP32]
Written = Callable[..., Path]


@pytest.fixture(scope="module")
def parity_json() -> Path:
    """That of the bundled network for ONNX."""
    return exported(CLASSIFIER, "onnx", "fp32").path / "parity.json"


@pytest.fixture
def written(parity_json: Path, tmp_path: Path) -> Written:
    """The same file with other numbers of its only output."""

    def write(**numbers: Any) -> Path:
        document = json.loads(parity_json.read_text())
        document["witnesses"][0]["outputs"][0] |= numbers
        (tmp_path / "parity.json").write_text(json.dumps(document))
        return tmp_path / "parity.json"

    return write


@pytest.mark.parametrize(
    ("limit", "code", "verdict"), [("1e-3", 0, "pass"), ("1e-9", 5, "inconclusive"), ("5", 5, "inconclusive")]
)
def test_a_real_exports_numbers_are_judged_by_another_limit(
    limit: str, code: int, verdict: str, parity_json: Path
) -> None:
    """1e-6 passes 1e-3; at 1e-9 it is rounding and no proof of a defect; at 5 spreads nothing could fail."""
    run = castling("verify", "--from", parity_json, "--rel", limit, "--json")
    assert run.code == code, run.err
    document = run.document
    assert document["verdict"] == verdict and document["saved"] == "pass" and document["limit"] == float(limit)
    (output,) = document["witnesses"][0]["outputs"]
    assert output["verdict"] == verdict and output["saved"] == "pass" and output["power"] is None
    assert [rung["limit"] for rung in document["rungs"]] == [None, 1e-9, 1e-5, float(limit)]
    assert "nothing was run" in run.err


def test_an_error_beyond_the_limit_is_exit_3(written: Written) -> None:
    saved = written(rel=5e-5, max_abs=3e-4)
    run = castling("verify", "--from", saved, "--rel", "1e-5", "--json")
    assert run.code == 3 and run.document["verdict"] == "fail" and "error: " in run.err
    assert castling("verify", "--from", saved, "--rel", "1e-4").code == 0


def test_no_limit_excuses_what_could_not_be_compared(written: Written) -> None:
    """A NaN or a wrong shape: no number was saved."""
    assert rejudge(written(rel=None, max_abs=None, verdict="fail"), 0.5).verdict is Verdict.FAIL


def test_a_failed_rung_before_the_export_stays_failed(parity_json: Path, tmp_path: Path) -> None:
    document = json.loads(parity_json.read_text())
    document["rungs"][0]["verdict"] = "fail"
    (tmp_path / "parity.json").write_text(json.dumps(document))
    assert rejudge(tmp_path / "parity.json", 1e-3).verdict is Verdict.FAIL


def test_an_output_in_its_own_unit_keeps_its_verdict(written: Written) -> None:
    saved = written(widest_limit=None, rel=0.5, verdict="fail")
    assert rejudge(saved, 0.9).verdict is Verdict.FAIL


def test_a_file_that_does_not_tell_its_widest_limit_is_refused(parity_json: Path, tmp_path: Path) -> None:
    document = json.loads(parity_json.read_text())
    del document["witnesses"][0]["outputs"][0]["widest_limit"]
    (tmp_path / "parity.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="how wide a limit"):
        rejudge(tmp_path / "parity.json", 1e-3)


@pytest.mark.parametrize("noise", [1e-8, 1e-5, 1e-2])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_saved_numbers_give_the_verdict_that_running_again_would(
    noise: float, scale: float, written: Written
) -> None:
    random = np.random.default_rng(0)
    expected = Reference((scale * random.normal(size=(24, 10))).astype(np.float32), real=24, noise=noise)
    for error in (0.0, 1e-6, 1e-3, 0.3):
        actual: Array = expected.outputs + np.float32(error) * np.float32(expected.spread or 1)
        saved = compared(actual, expected, FP32)
        for limit in (1e-7, 1e-5, 1e-3, 0.1, 0.4, 0.6, 0.8, 1.0, 2.0):
            again = compared(actual, expected, Tolerance(limit, FP32.epsilon))
            path = written(**{name: saved[name] for name in ("rel", "max_abs", "noise_rel", "widest_limit", "verdict")})
            assert rejudge(path, limit).report.witnesses[0].verdict == again["verdict"], (error, limit)


def compared(actual: Array, expected: Reference, tolerance: Tolerance) -> dict[str, Any]:
    return vars(
        compare("logits", actual, expected, tolerance, expected.power(tolerance), expected.widest_limit(tolerance))
    )
