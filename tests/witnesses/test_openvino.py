"""OpenVINO's CPU plugin computes what ONNX Runtime does, and never in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported import CLASSIFIER, DETECTOR, damaged, exported, passed, verdicts, with_another_weight

from castling_deploy.errors import ExportError
from castling_deploy.parity import Verdict
from castling_deploy.target import WitnessKind
from castling_deploy.witnesses.openvino import OpenVINO

pytest.importorskip("openvino")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_agrees_on_a_classifier(precision: str) -> None:
    """In bfloat16, which it takes unasked where the CPU has it, fp32 would be off by 30 times the limit."""
    assert passed(verdicts(OpenVINO(), exported(CLASSIFIER, "onnx", precision)))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_it_agrees_on_a_detector_and_its_boxes(precision: str) -> None:
    found = verdicts(OpenVINO(), exported(DETECTOR, "onnx", precision, nms=True))
    assert passed(found) and {"boxes", "scores", "labels"} <= found.keys()


def test_it_takes_any_batch_of_a_dynamic_one() -> None:
    assert passed(verdicts(OpenVINO(), exported(CLASSIFIER, "onnx", "fp32", dynamic=True)))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_single_weight_is_seen(precision: str, tmp_path: Path) -> None:
    folder = with_another_weight(exported(CLASSIFIER, "onnx", precision), tmp_path / "changed")
    assert verdicts(OpenVINO(), folder) == {"logits": Verdict.FAIL}


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="OpenVINO does not run the artefact"):
        verdicts(OpenVINO(), damaged(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "damaged"))


def test_it_says_what_it_is() -> None:
    witness = OpenVINO().witness()
    assert OpenVINO().missing() is None
    assert witness.kind is WitnessKind.RUNTIME and "float32" in witness.name
