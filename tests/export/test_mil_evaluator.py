"""The evaluator of saved Core ML programs: how it rounds, what it takes, and what it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.proto import MIL_pb2, Model_pb2
from mil_programs import PLANE, Lambda, built, noise, run, saved
from torch import nn

from castling_deploy.errors import ExportError, ShapeError, UsageError
from castling_deploy.export.mil_evaluator import Program, load_program
from castling_deploy.export.mil_package import model_file, read_package
from castling_deploy.export.mil_shape_ops import UnsupportedOpError
from castling_deploy.export.mil_sums import Float16Sums, Float32Sums

# -- float16


def linear_program(folder: Path, weight: torch.Tensor, **arithmetic: Any) -> Program:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return load_program(saved(layer, noise((1, weight.shape[1])), folder, "FLOAT16"), **arithmetic)


def test_float16_programs_round_what_they_store(tmp_path: Path) -> None:
    (weight,) = noise((4, 64))
    x = noise((1, 64))[0] + 1
    (got,) = run(linear_program(tmp_path, weight), [x])
    want = (x.half().float() @ weight.half().float().T).half()
    assert np.array_equal(got, want.numpy()) and not np.array_equal(got, (x @ weight.T).half().numpy())


def test_float16_sums_lose_what_falls_below_half_a_step(tmp_path: Path) -> None:
    x = torch.tensor([[2048.0, 1.0, 1.0, 1.0]])  # 2049 lies between two float16 numbers
    assert run(linear_program(tmp_path, torch.ones(1, 4)), [x])[0] == 2052
    assert run(linear_program(tmp_path, torch.ones(1, 4), accumulate="float16"), [x])[0] == 2048


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 2), (1, 2, 4)])
def test_float16_convolutions_are_the_same_sums(stride: int, dilation: int, groups: int) -> None:
    x, weight = noise((2, 4, 9, 7), (4, 4 // groups, 3, 2))
    x, weight = x.half().float(), weight.half().float()
    wide = Float32Sums().conv(x, weight, [stride] * 2, [dilation] * 2, groups)
    narrow = Float16Sums().conv(x, weight, [stride] * 2, [dilation] * 2, groups)
    assert narrow.shape == wide.shape and not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=5e-2)


def test_float16_sums_are_those_of_a_loop() -> None:
    (x,) = noise((3, 4, 5))
    running = np.zeros(4, np.float16)
    for term in x.half().numpy().transpose(0, 2, 1).reshape(15, 4):
        running = running + term  # numpy rounds every sum to float16
    assert np.array_equal(Float16Sums().total(x, [0, 2]).numpy().ravel(), running.astype(np.float32))


def test_a_norm_overflows_in_float16_sums_only(tmp_path: Path) -> None:
    module = Lambda(lambda x: torch.linalg.vector_norm(x, dim=-1))
    path = saved(module, noise((1, 16)), tmp_path, "FLOAT16")
    x = torch.full((1, 16), 300.0)  # 300^2 is over 65504
    assert run(load_program(path), [x])[0] == 1200
    assert run(load_program(path, accumulate="float16"), [x])[0] == math.inf


def test_flushing_makes_subnormal_weights_zero(tmp_path: Path) -> None:
    weight = torch.tensor([[2.0**-15, 2.0**-14]])
    x = torch.tensor([[1024.0, 1024.0]])
    assert run(linear_program(tmp_path, weight), [x])[0] == 1024 * 1.5 * 2.0**-14
    assert run(linear_program(tmp_path, weight, flush_subnormals=True), [x])[0] == 1024 * 2.0**-14


# -- images


@pytest.fixture(scope="module", params=["RGB", "BGR", "GRAYSCALE"])
def camera(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Program]:
    path = tmp_path_factory.mktemp("camera") / "camera.mlpackage"
    channels = 1 if request.param == "GRAYSCALE" else 3
    program = torch.export.export(Lambda(lambda x: x + 0.5), noise((1, channels, 4, 5))).run_decompositions({})
    ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT32,
        inputs=[
            ct.ImageType(
                name="x0",
                shape=(1, channels, 4, 5),
                scale=1 / 127.5,
                bias=[-1] * channels,
                color_layout=getattr(ct.colorlayout, request.param),
            )
        ],
    ).save(str(path))
    return request.param, load_program(path)


def test_pixels_reach_the_program_scaled_and_in_its_order(camera: tuple[str, Program]) -> None:
    order, program = camera
    pixels = np.random.default_rng(0).integers(0, 256, program.package.inputs[0].shape, np.uint8)
    (got,) = program({"x0": pixels}).values()
    seen = pixels[..., ::-1] if order == "BGR" else pixels
    np.testing.assert_allclose(got, seen.transpose(0, 3, 1, 2) / 127.5 - 1 + 0.5, atol=1e-6)


def test_an_input_of_another_kind_is_refused(camera: tuple[str, Program]) -> None:
    program = camera[1]
    shape = program.package.inputs[0].shape
    for bad in (
        {"x0": np.zeros(shape, np.float32)},
        {"x0": np.zeros((2, *shape[1:]), np.uint8)},
        {"y": np.zeros(shape, np.uint8)},
    ):
        with pytest.raises(ShapeError):
            program(bad)  # type: ignore[arg-type]


# -- what is refused


@pytest.fixture
def package(tmp_path: Path) -> Path:
    linear = nn.Linear(16, 4)
    return saved(Lambda(lambda x, layer: layer(x).relu(), linear), noise((2, 16)), tmp_path)


def edit(package: Path, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Change the message of a saved package; `change` is handed it and its operations by type."""
    model = Model_pb2.Model()
    model.ParseFromString(model_file(package).read_bytes())
    function = model.mlProgram.functions["main"]
    steps = function.block_specializations[function.opset].operations
    change(model, {operation.type: operation for operation in steps})
    model_file(package).write_bytes(model.SerializeToString())


def test_unknown_operations_are_named_when_the_package_is_loaded(package: Path) -> None:
    def change(model: Any, steps: dict[str, Any]) -> None:
        steps["relu"].type = "frobnicate"
        steps["linear"].inputs["twist"].CopyFrom(steps["linear"].inputs["x"])

    edit(package, change)
    with pytest.raises(UnsupportedOpError, match=r"linear with twist \('linear_0'\); frobnicate \('relu'\)"):
        load_program(package)


def test_a_parameter_value_that_is_not_covered_is_named(tmp_path: Path) -> None:
    program = load_program(
        built(
            lambda x0: mb.avg_pool(x=x0, kernel_sizes=[2, 2], strides=[2, 2], pad_type="same", name="pooled"),
            [PLANE],
            tmp_path,
        )
    )
    with pytest.raises(UnsupportedOpError, match="avg_pool 'pooled': pad_type 'same' with reach"):
        run(program, noise(PLANE))


def test_a_result_of_another_shape_than_declared_is_an_error(package: Path) -> None:
    def change(model: Any, steps: dict[str, Any]) -> None:
        steps["linear"].outputs[0].type.tensorType.dimensions[1].constant.size = 5

    edit(package, change)
    with pytest.raises(ExportError, match=r"linear 'linear_0' gives torch\.float32 \(2, 4\), .* FLOAT32 \(2, 5\)"):
        run(load_program(package), noise((2, 16)))


def test_a_result_of_another_dtype_than_declared_is_an_error(package: Path) -> None:
    def change(model: Any, steps: dict[str, Any]) -> None:
        steps["linear"].outputs[0].type.tensorType.dataType = MIL_pb2.FLOAT16

    edit(package, change)
    with pytest.raises(ExportError, match=r"gives torch\.float32"):
        run(load_program(package), noise((2, 16)))


def test_an_interface_that_the_program_does_not_keep_is_an_error(package: Path) -> None:
    edit(package, lambda model, steps: setattr(model.description.output[0].type.multiArrayType, "dataType", 65552))
    with pytest.raises(ExportError, match="is float16, in the program FLOAT32"):
        load_program(package)


def test_a_value_used_before_it_is_made_is_an_error(package: Path) -> None:
    edit(package, lambda model, steps: setattr(steps["relu"].inputs["x"].arguments[0], "name", "nowhere"))
    with pytest.raises(ExportError, match="uses 'nowhere'"):
        load_program(package)


def test_weights_are_read_as_coremltools_reads_them(package: Path) -> None:
    constants = read_package(package).constants
    reader = ct.libmilstoragepython._BlobStorageReader(str(model_file(package).parent / "weights" / "weight.bin"))
    wanted = np.array(reader.read_float_data(64)).reshape(4, 16)  # the first weight of the file
    assert any(isinstance(value, np.ndarray) and np.array_equal(value, wanted) for value in constants.values())


def test_another_place_for_sums_is_refused(package: Path) -> None:
    with pytest.raises(UsageError, match="sums cannot be kept in 'fp16'"):
        load_program(package, accumulate="fp16")  # type: ignore[arg-type]


def test_damaged_packages_are_errors(package: Path, tmp_path: Path) -> None:
    weights = model_file(package).parent / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ExportError, match="holds no FLOAT32 weight"):
        load_program(package)
    model_file(package).write_bytes(b"not a protobuf")
    with pytest.raises(ExportError, match="damaged"):
        load_program(package)
    with pytest.raises(ExportError, match=r"is no \.mlpackage"):
        load_program(tmp_path)
