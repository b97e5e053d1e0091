"""Qualcomm's simulated HTP runs whole artefacts, in float16, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from deployments import castling
from exported import (
    CLASSIFIER,
    DETECTOR,
    Apart,
    changed,
    damaged,
    exported,
    outputs_of,
    passed,
    verdicts,
    with_another_weight,
)

from castling_deploy.errors import ExportError
from castling_deploy.parity import Verdict
from castling_deploy.runner import arithmetic_of
from castling_deploy.target import Precision, WitnessKind
from castling_deploy.witnesses.qnn import QnnHost

pytest.importorskip("onnxruntime_qnn")
TRANSFORMER = "castling-deit-digits"
COUNT = 3  # images: one takes 0.7 s
HTP = Apart(QnnHost())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_agrees_on_a_classifier_within_the_limit_of_float16(precision: str) -> None:
    assert arithmetic_of(QnnHost(), Precision(precision)) is Precision.FP16
    assert passed(verdicts(HTP, exported(CLASSIFIER, "onnx", precision), COUNT))


def test_a_float32_artefact_is_computed_in_float16() -> None:
    """The reason for `arithmetic`: its outputs are float16 numbers, as those of the float16 artefact are."""
    for name in ("fp32", "fp16"):
        logits = outputs_of(HTP, exported(CLASSIFIER, "onnx", name), 1)["logits"]
        np.testing.assert_allclose(logits, logits.astype(np.float16), rtol=1e-6, err_msg=name)  # float16's: 5e-4


def test_a_dynamic_batch_is_fixed_to_one() -> None:
    assert passed(verdicts(HTP, exported(CLASSIFIER, "onnx", "fp32", dynamic=True), COUNT))


def test_a_detector_runs_without_its_boxes() -> None:
    assert passed(verdicts(HTP, exported(DETECTOR, "onnx", "fp32"), COUNT))


def test_what_the_cpu_would_have_to_compute_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"the CPU would compute: .*NonMaxSuppression"):
        outputs_of(HTP, exported(DETECTOR, "onnx", "fp32", nms=True), 1)


def test_a_single_weight_is_seen(tmp_path: Path) -> None:
    folder = with_another_weight(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "changed")
    assert verdicts(HTP, folder, COUNT) == {"logits": Verdict.FAIL}


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="HTP does not run the artefact"):
        outputs_of(HTP, damaged(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "damaged"), 1)


def test_it_is_called_a_simulation() -> None:
    assert QnnHost().missing() is None
    assert QnnHost().witness().kind is WitnessKind.SIMULATED


def test_it_agrees_on_an_artefact_in_8_and_16_bits_and_sees_a_stale_scale(tmp_path: Path) -> None:
    folder = exported(CLASSIFIER, "onnx", "int8", activations="uint16")
    assert QnnHost().unfit(folder.artifact) is None and arithmetic_of(QnnHost(), Precision.INT8) is Precision.INT8
    assert passed(verdicts(HTP, folder, COUNT))

    def coarser(file: Path) -> None:
        model = onnx.load(file)
        scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("/scale"))
        scale.CopyFrom(onnx.numpy_helper.from_array(1.2 * onnx.numpy_helper.to_array(scale), scale.name))
        onnx.save(model, file)

    assert verdicts(HTP, changed(folder, tmp_path / "changed", coarser), COUNT) == {"logits": Verdict.FAIL}


def test_an_image_that_is_rounded_first_is_rounded_by_the_htp() -> None:
    assert passed(verdicts(HTP, exported(TRANSFORMER, "onnx", "int8", activations="uint16"), COUNT))


def test_it_says_what_to_export_instead_of_8_bit_activations() -> None:
    missing = QnnHost().unfit(exported(CLASSIFIER, "onnx", "int8").artifact)
    assert missing is not None and "--activations uint16" in missing.fix
    process = castling("verify", exported(CLASSIFIER, "onnx", "int8").path, "--on", "qnn")
    assert process.code == 4 and "--activations uint16" in process.err
