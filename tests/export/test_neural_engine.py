"""The report on the Neural Engine: every rule on an operation that breaks it, and none on one that does not."""

from __future__ import annotations

import pytest
import torch
from exported import CLASSIFIER, exported
from folded_networks import network_of
from torch import nn

from castling_deploy.export.coreai_asset import read_asset
from castling_deploy.export.coreai_program import converted, exported_program
from castling_deploy.export.coreai_steps import steps_of
from castling_deploy.export.coreml_contents import steps
from castling_deploy.export.mil_package import Declared, Operation, Package, read_package
from castling_deploy.export.neural_engine import (
    ELSEWHERE,
    EVERY,
    FLOAT32,
    HARDSWISH,
    OPEN,
    PADDED,
    RANK,
    Step,
    Value,
    note,
    unfit,
)
from castling_deploy.target import Precision


def made(name: str, kind: str, shape: tuple[int | None, ...], dtype: str = "float16", x: str = "image") -> Step:
    return Step(name, kind, (x,), (Value(name, dtype, shape),))


SOUND = (
    made("narrow", "cast", (1, 3, 8, 8), x="wide"),
    made("product", "linear", (1, 64, 32)),
    made("swish", "hard_swish", (1, 64, 32), x="product"),
    made("scalar", "reduce_sum", (1, 1, 1)),
    made("logits", "cast", (1, 10), "float32"),
)


def test_a_sound_program_has_nothing_to_report() -> None:
    assert unfit(SOUND) == {} and note({}, 5) == []


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (made("island", "matmul", (1, 64, 32), "float32"), FLOAT32),
        (made("many", "reshape", (1, 2, 2, 2, 2, 2)), RANK),
        (made("length", "reduce_l2_norm", (1, 3, 64, 1)), PADDED),
        (made("open", "relu", (None, 64, 32)), OPEN),
        (made("best", "topk", (1, 64, 32)), ELSEWHERE),
    ],
    ids=lambda value: value if isinstance(value, str) else value.type,
)
def test_an_operation_that_breaks_a_rule_is_named(step: Step, reason: str) -> None:
    found = unfit((*SOUND, step))
    assert found == {reason: [step.name]}
    assert f"1 of 6 operations are unfit: 1 {reason}" in note(found, 6)[0]


def test_a_product_of_two_axes_before_a_hardswish_is_named() -> None:
    flat = made("flat", "linear", (64, 32)), made("after", "hard_swish", (64, 32), x="flat")
    assert unfit((*SOUND, *flat)) == {HARDSWISH: ["flat"]}


def test_a_program_in_float32_is_one_finding() -> None:
    found = unfit([made("product", "linear", (1, 64, 32), "float32")])
    assert found == {FLOAT32: [EVERY]} and "CPU or the GPU" in note(found, 1)[0]


def test_core_ml_computes_its_weights_before_the_program_runs() -> None:
    weight = Operation("w", "constexpr_affine_dequantize", {}, (Declared("w", "FLOAT32", (32, 1)),))
    product = Operation("y", "linear", {"x": ("x",), "weight": ("w",)}, (Declared("y", "FLOAT16", (1, None)),))
    (found,) = steps(Package((), (), (), (), (weight, product), {}, 8, {}))
    assert found == Step("y", "linear", ("x", "w"), (Value("y", "float16", (1, None)),))


def test_core_ai_does_too_and_names_what_feeds_a_hardswish_through_its_bias() -> None:
    """There a Linear is a transposed weight, a product and a sum, and a composite is one operation."""
    pytest.importorskip("coreai_torch", reason="Core AI's packages have wheels for Linux x86-64 and macOS alone")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), nn.Linear(128, 32), nn.Hardswish(), nn.Linear(32, 10))
    program = exported_program(network_of(layers.eval(), (32, 32)), Precision.FP16)
    module = converted(program, ("image",), ("logits",))._module._mlir_module
    found = list(steps_of(list(module.body.operations)[-1]))
    assert [step.type for step in found] == [
        *("cast", "conv2d", "broadcasting_add", "reshape"),
        *("broadcasting_batch_matmul", "broadcasting_add", "hard_sigmoid", "broadcasting_mul"),
        *("broadcasting_batch_matmul", "broadcasting_add", "cast"),
    ]
    assert found[6].outputs == (Value("hard_sigmoid.1", "float16", (1, 32)),)
    assert found[7].inputs == ("broadcasting_add.2", "hard_sigmoid.1")
    assert unfit(found) == {HARDSWISH: ["broadcasting_batch_matmul.1"]}


def test_the_report_of_an_export_names_its_norms() -> None:
    folder = exported(CLASSIFIER, "coreml", "fp16")
    details, running = folder.artifact.details, steps(read_package(folder.path / "model.mlpackage"))
    found = unfit(running)
    assert details["unfit_for_the_neural_engine"] == found
    assert len(found[PADDED]) == sum(step.type in ("reduce_l2_norm", "maximum") for step in running)
    assert details["notes"] == note(found, len(running))


def test_the_report_of_a_core_ai_export_names_the_same() -> None:
    folder = exported(CLASSIFIER, "coreai", "fp16")
    details, running = folder.artifact.details, read_asset(folder.path / "model.aimodel").steps
    found = unfit(running)
    assert details["unfit_for_the_neural_engine"] == found
    assert len(found[PADDED]) == sum(step.type in ("linalg_vector_norm", "broadcasting_maximum") for step in running)
    assert details["notes"] == note(found, len(running))
