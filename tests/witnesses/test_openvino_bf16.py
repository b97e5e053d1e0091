"""What OpenVINO computes unasked, in bfloat16: judged by bfloat16's limit, and told from float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from exported import CLASSIFIER, damaged, exported, passed, verdicts, with_another_weight

from castling_deploy.errors import ExportError
from castling_deploy.parity import Verdict
from castling_deploy.runner import runners_of
from castling_deploy.target import Precision, target_named
from castling_deploy.witnesses import openvino_bf16
from castling_deploy.witnesses.openvino_bf16 import OpenVINOBfloat16

pytest.importorskip("openvino")


def judged(folder: Path) -> Mapping[str, Verdict]:
    """Where the CPU has no bfloat16, OpenVINO says that it computes in float32, and no verdict is made of that."""
    if OpenVINOBfloat16().missing() is None:
        return verdicts(OpenVINOBfloat16(), folder)
    with pytest.raises(ExportError, match="where bf16 was asked for"):
        verdicts(OpenVINOBfloat16(), folder)
    return {}


def test_it_agrees_within_the_limit_of_bfloat16() -> None:
    assert passed(judged(exported(CLASSIFIER, "onnx", "fp32")))


def test_it_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it float32, it would pass float32's limit too."""
    monkeypatch.setattr(OpenVINOBfloat16, "arithmetic", lambda self, precision: precision)
    found = judged(exported(CLASSIFIER, "onnx", "fp32"))
    assert not found or not passed(found)


def test_another_weight_is_seen(tmp_path: Path) -> None:
    folder = with_another_weight(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "changed")
    assert Verdict.PASS not in judged(folder).values()


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="OpenVINO does not run the artefact"):
        verdicts(OpenVINOBfloat16(), damaged(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "damaged"))


def test_a_cpu_without_bfloat16_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2 avx2")
    monkeypatch.setattr(openvino_bf16, "CPU", tmp_path / "cpuinfo")
    missing = OpenVINOBfloat16().missing()
    assert missing is not None and "no bfloat16" in missing.reason


def test_it_is_for_float32_artefacts() -> None:
    assert "openvino-bf16" not in runners_of(target_named("onnx"), Precision.FP16)
    assert "openvino-bf16" in runners_of(target_named("onnx"), Precision.FP32)
