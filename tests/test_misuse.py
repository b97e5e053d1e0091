"""What the command refuses, in two lines, before anything heavy is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from deployments import castling, without_torch

from castling_deploy.errors import UsageError
from castling_deploy.target import Precision, precision_for, target_named

USAGE = {
    "an unknown target": (["export", "--target", "corml"], "unknown target 'corml'", "did you mean 'coreml'"),
    "no target": (["export", "--target", ","], "no target is named", "onnx"),
    "a missing target": (["export"], "--target", "--help"),
    "an unknown bundled model": (
        ["export", "--target", "onnx", "-m", "castling-levit-digit"],
        "no trained weights named 'castling-levit-digit'",
        "did you mean 'castling-levit-digits'",
    ),
    "an unknown precision": (
        ["export", "--target", "onnx", "--precision", "fp61"],
        "unknown precision 'fp61'",
        "'fp16'",
    ),
    "an option that a target lacks": (
        ["export", "--target", "coreml", "--opset", "20"],
        "'coreml' has no option --opset",
        "--input",
    ),
    "another one": (
        ["export", "--target", "executorch", "--dynamic"],
        "'executorch' has no option --dynamic",
        "leave it",
    ),
    **{
        f"boxes in {target}": (
            ["export", "--target", target, "--nms"],
            f"'{target}' has no option --nms",
            "leave it out",
        )
        for target in ("coreml", "coreai", "executorch", "tensorrt")
    },
    "boxes of a classifier": (
        ["export", "--target", "onnx", "--nms"],
        "--nms for detection alone, and this is a network for classification",
        "leave out --nms",
    ),
    "activations of floats": (
        ["export", "--target", "onnx", "--activations", "uint16"],
        "--activations is for int8",
        "--precision int8",
    ),
    "other activations": (
        ["export", "--target", "onnx", "--precision", "int8", "--activations", "uint61"],
        "activations of int8 cannot be 'uint61'",
        "did you mean 'uint16'",
    ),
    "weights of 4 bits in floats": (
        ["export", "--target", "executorch", "--weight-bits", "4"],
        "--weight-bits is for int8",
        "--precision int8",
    ),
    "weights of 3 bits": (
        ["export", "--target", "executorch", "--precision", "int8", "--weight-bits", "3"],
        "no weights of 3 bits",
        "4 or 8",
    ),
    "weights of 4 bits for TensorRT": (
        ["export", "--target", "tensorrt", "--precision", "int8", "--weight-bits", "4"],
        "'tensorrt' has no option --weight-bits",
        "leave it out",
    ),
    "16 bits in an old opset": (
        ["export", "--target", "onnx", "--precision", "int8", "--activations", "uint16", "--opset", "20"],
        "opset 20 has no such levels",
        "21",
    ),
    "a bad opset": (["export", "--target", "onnx", "--opset", "11"], "opset 11", "20"),
    "a bad input kind": (["export", "--target", "coreml", "--input", "picture"], "picture", "image"),
    "a bad layout": (["export", "--target", "coreml", "--layout", "first"], "unknown layout 'first'", "channels-first"),
    "a typo beside all": (["export", "--target", "all,onnxx"], "unknown target 'onnxx'", "did you mean 'onnx'"),
    "a fixed and a dynamic batch": (
        ["export", "--target", "onnx", "--dynamic", "-b", "3"],
        "exclude each other",
        "leave out one",
    ),
    "several images in one Core ML image": (
        ["export", "--target", "coreml", "--input", "image", "-b", "2"],
        "holds one image, not 2",
        "--batch-size 1",
    ),
    "a dry run of nothing": (["export", "nowhere.pth", "--target", "onnx", "--dry-run"], "no file", "path"),
    "a negative seed": (["export", "--target", "onnx", "--seed", "-1"], "--seed", "castling export --help"),
    "a size in another script": (["export", "--target", "onnx", "--imgsz", "\u00b2"], "no image size", "--help"),
    "a name that no disk holds": (["export", "--target", "onnx", "-o", "x" * 300], "cannot write", "--output"),
    "a bad size": (["export", "--target", "onnx", "--imgsz", "big"], "no image size", "--help"),
    "a size that no patch fits": (
        ["export", "--target", "onnx", "-m", "castling-deit-digits", "--imgsz", "33"],
        "33 x 33 pixels cannot be cut into patches of 4",
        "multiples of 4",
    ),
    "an unknown option": (["export", "--target", "onnx", "--tragt", "x"], "--tragt", "--help"),
    "an unknown command": (["exprot"], "exprot", "--help"),
    "a checkpoint that is not there": (["export", "nowhere.pth", "--target", "onnx"], "no file 'nowhere.pth'", "path"),
    "a limit that is no number": (
        ["diff", ".", ".", "--max-drop", "nan"],
        "'nan' is no number",
        "castling diff --help",
    ),
    "a limit for numbers that are not saved": (["verify", "x", "--rel", "1e-3"], "run nothing", "leave out"),
    "saved numbers and a checkpoint": (
        ["verify", "--from", "parity.json", "--rel", "1e-3", "--checkpoint", "best.pth"],
        "run nothing",
        "leave out everything else but --json",
    ),
    "saved numbers without a limit": (["verify", "--from", "parity.json"], "go together", "--rel 1e-3"),
    "a limit of zero": (["verify", "--from", "parity.json", "--rel", "0"], "--rel", "castling verify --help"),
    "saved numbers that are not there": (["verify", "--from", "none.json", "--rel", "1"], "none.json", "export"),
    "an unknown witness": (
        ["verify", "x", "--on", "ort,opnvino"],
        "nothing called 'opnvino'",
        "did you mean 'openvino'",
    ),
    "no witness": (["verify", "x", "--on", ","], "--on names nobody", "castling doctor"),
    "verifying nothing": (["verify"], "no artefact folder", "castling verify DIR"),
    "a comparison with nothing": (["diff", ".", "."], "is no artefact folder", "castling export"),
    "a folder that is no artefact": (["verify", "."], "is no artefact folder", "castling export"),
    "calibration that nothing uses": (
        ["export", "--target", "onnx", "--calib-data", "x"],
        "has nothing to calibrate",
        "--precision int8",
    ),
    "calibration on nothing": (
        ["export", "--target", "onnx", "--precision", "int8", "--calib-data", "nowhere"],
        "there is nothing at 'nowhere'",
        ".npz",
    ),
    "int8 for a batch": (
        ["export", "--target", "onnx", "--precision", "int8", "--batch-size", "2"],
        "a batch of one",
        "leave out --batch-size",
    ),
}


@pytest.mark.parametrize("name", USAGE)
def test_misuse_is_two_lines_exit_2_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    arguments, message, hint = USAGE[name]
    run = castling(*arguments, cwd=tmp_path)
    lines = run.err.strip().splitlines()
    assert run.code == 2 and run.out == ""
    assert lines[-2].startswith("error: ") and message in lines[-2] and hint in lines[-1]
    assert "Traceback" not in run.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["another one", "an unknown witness", "no witness"])
def test_misuse_is_refused_before_torch_is_imported(name: str) -> None:
    arguments, message, _ = USAGE[name]
    run = without_torch(*arguments)
    assert run.code == 2 and message in run.err, run.err


def test_a_precision_that_a_target_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_named("coreai")
    monkeypatch.setattr(type(target), "precisions", (Precision.FP16, Precision.FP32))
    with pytest.raises(UsageError, match="'coreai' cannot be built in int8") as refused:
        precision_for(target, "int8")
    assert "fp16, fp32" in str(refused.value.hint)


def test_errors_are_one_json_document_too() -> None:
    run = castling("export", "nowhere.pth", "--target", "onnx", "--json")
    assert run.code == 2 and run.document["error"]["exit_code"] == 2 and run.document["artifacts"] == []
