"""`castling verify --on`: several witnesses of one artefact, and what a frail one costs the others: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported import CLASSIFIER, exported

from castling_deploy import runner
from castling_deploy.errors import TargetUnavailableError, UsageError
from castling_deploy.isolation import IN_PROCESS, Limits
from castling_deploy.parity import Verdict
from castling_deploy.progress import Silent
from castling_deploy.rechecking.checks import examine
from castling_deploy.rechecking.recheck import verify

FRAIL = ("crashing", "hanging", "lying", "missing")


@pytest.fixture(scope="module")
def artifact() -> Path:
    return exported(CLASSIFIER, "onnx", "fp32").path


@pytest.fixture(autouse=True)
def frail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IN_PROCESS, raising=False)
    monkeypatch.setattr(runner, "RUNNERS", tuple(f"frail_runners:{name}" for name in FRAIL))


def test_every_witness_has_its_own_verdict_and_a_crash_ends_no_other(artifact: Path) -> None:
    seen = verify(artifact, on=["all"], limits=Limits(seconds=12))
    own, crashing, hanging, lying = seen.golden
    assert own.verdict is Verdict.PASS
    assert crashing.failure is not None and crashing.failure.how == "crash" and crashing.verdict is Verdict.FAIL
    assert "SIGSEGV" in crashing.failure.message
    assert hanging.failure is not None and hanging.failure.how == "timeout"
    assert hanging.verdict is Verdict.INCONCLUSIVE
    assert lying.failure is None and lying.verdict is Verdict.FAIL
    assert [absent.name for absent in seen.absent] == ["missing"]
    assert seen.verdict is Verdict.FAIL


def test_a_crash_is_a_failed_check_with_its_reason(artifact: Path) -> None:
    seen = examine(artifact, None, Silent(), on=["crashing"])
    (check,) = [check for check in seen.checks if check.group == "golden images"]
    assert check.verdict is Verdict.FAIL and "SIGSEGV" in check.told
    assert seen.exit_code == 3


def test_only_those_named_are_asked(artifact: Path) -> None:
    assert [seen.witness.name for seen in verify(artifact, on=["lying"]).golden] == ["the lying one"]
    assert len(verify(artifact, on=["ort", "lying"]).golden) == 2


def test_one_without_anything_to_say_of_a_precision_is_passed_over_or_refused_by_name(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RUNNERS", ("castling_deploy.witnesses.ort_half:OrtHalf",))
    assert len(verify(artifact, on=["all"]).golden) == 1, "float16 rounding of a float32 file is no rounding"
    with pytest.raises(UsageError, match="'ort-fp16' has nothing of its own to say of an artefact in fp32") as caught:
        verify(artifact, on=["ort", "ort-fp16"])
    assert "artefacts in fp16" in str(caught.value.hint)


def test_one_that_is_named_and_not_here_is_an_error(artifact: Path) -> None:
    with pytest.raises(TargetUnavailableError, match="its runtime is not installed"):
        verify(artifact, on=["ort", "missing"])


def test_unknown_names_and_names_of_other_targets_are_told_apart(artifact: Path) -> None:
    with pytest.raises(UsageError, match="nothing called 'lyin' runs artefacts") as caught:
        verify(artifact, on=["lyin"])
    assert "lying" in str(caught.value.hint)
    with pytest.raises(UsageError, match="nothing called 'lyin'"):
        verify(artifact / "nowhere", on=["lyin"])
    with pytest.raises(TargetUnavailableError, match="none of those named runs"):
        verify(artifact, on=["executorch"])
