"""What every runner in the list keeps, whatever is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from castling_deploy.runner import RUNNERS, arithmetic_of, chosen, precisions_of, runners_of
from castling_deploy.target import TARGETS, Arithmetic, Precision, WitnessKind, target_named

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime_qnn", "openvino", "tensorrt", "tensorrt_rtx")


@pytest.mark.parametrize("entry", RUNNERS)
def test_a_runner_is_made_without_any_toolchain(entry: str) -> None:
    module, _, attribute = entry.partition(":")
    code = (
        f"import sys\nfor name in {HEAVY!r}:\n    sys.modules[name] = None\n"
        f"from {module} import {attribute}\nrunner = {attribute}()\n"
        "assert runner.name and runner.targets and (runner.images is None or runner.images >= 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_runner_is_found_by_its_name(target: str) -> None:
    for name, runner in runners_of(target_named(target)).items():
        (found,) = chosen(target_named(target), precisions_of(runner)[0], [name])
        assert type(found) is type(runner) and target in found.targets
        if found.missing() is None:
            assert isinstance(found.witness().kind, WitnessKind)


def test_a_runner_computes_in_the_artefacts_precision_unless_it_says_otherwise() -> None:
    own = {"openvino": Precision.FP32, "web": Precision.FP32, "qnn": Precision.FP16, "openvino-bf16": Arithmetic.BF16}
    for name, expected in own.items():
        assert arithmetic_of(runners_of(target_named("onnx"))[name], Precision.FP32) is expected
