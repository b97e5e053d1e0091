"""The report on the Neural Engine: every rule on an operation that breaks it, and none on one that does not."""

from __future__ import annotations

import pytest
from exported import CLASSIFIER, exported

from castling_deploy.export.mil_package import Declared, Operation, Package, read_package
from castling_deploy.export.neural_engine import (
    ELSEWHERE,
    EVERY,
    FLOAT32,
    HARDSWISH,
    OPEN,
    PADDED,
    RANK,
    note,
    unfit,
)


def made(name: str, kind: str, shape: tuple[int | None, ...], dtype: str = "FLOAT16", x: str = "image") -> Operation:
    return Operation(name, kind, {"x": (x,)}, (Declared(name, dtype, shape),))


SOUND = (
    made("narrow", "cast", (1, 3, 8, 8), x="wide"),
    made("product", "linear", (1, 64, 32)),
    made("swish", "hard_swish", (1, 64, 32), x="product"),
    made("scalar", "reduce_sum", (1, 1, 1)),
    made("weight", "constexpr_affine_dequantize", (32, 1), "FLOAT32"),
    made("logits", "cast", (1, 10), "FLOAT32"),
)


def program(*operations: Operation) -> Package:
    return Package((), (), (), (), (*SOUND, *operations), {}, 8, {})


def test_a_sound_program_has_nothing_to_report() -> None:
    assert unfit(program()) == {} and note({}, 6) == []


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (made("island", "matmul", (1, 64, 32), "FLOAT32"), FLOAT32),
        (made("many", "reshape", (1, 2, 2, 2, 2, 2)), RANK),
        (made("length", "reduce_l2_norm", (1, 3, 64, 1)), PADDED),
        (made("open", "relu", (None, 64, 32)), OPEN),
        (made("best", "topk", (1, 64, 32)), ELSEWHERE),
    ],
    ids=lambda value: value if isinstance(value, str) else value.type,
)
def test_an_operation_that_breaks_a_rule_is_named(operation: Operation, reason: str) -> None:
    assert unfit(program(operation)) == {reason: [operation.name]}
    assert f"1 of 7 operations are unfit: 1 {reason}" in note(unfit(program(operation)), 7)[0]


def test_a_product_of_two_axes_before_a_hardswish_is_named() -> None:
    flat = made("flat", "linear", (64, 32)), made("after", "hard_swish", (64, 32), x="flat")
    assert unfit(program(*flat)) == {HARDSWISH: ["flat"]}


def test_a_program_in_float32_is_one_finding() -> None:
    wide = Package((), (), (), (), (made("product", "linear", (1, 64, 32), "FLOAT32"),), {}, 8, {})
    assert unfit(wide) == {FLOAT32: [EVERY]} and "CPU or the GPU" in note(unfit(wide), 1)[0]


def test_the_report_of_an_export_names_its_norms() -> None:
    folder = exported(CLASSIFIER, "coreml", "fp16")
    details = folder.artifact.details
    package = read_package(folder.path / "model.mlpackage")
    assert details["unfit_for_the_neural_engine"] == unfit(package)
    assert len(unfit(package)[PADDED]) == sum(
        operation.type in ("reduce_l2_norm", "maximum") for operation in package.operations
    )
    assert details["notes"] == note(unfit(package), len(package.operations))
