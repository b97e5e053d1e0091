"""The evaluator of saved Core ML programs, operation by operation against torch, and against what it must refuse."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import numpy as np
import numpy.typing as npt
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from coremltools.proto import MIL_pb2, Model_pb2
from torch import nn
from torch.nn import functional as F

from castling_deploy.errors import ExportError, ShapeError, UsageError
from castling_deploy.export.mil_evaluator import Program, load_program
from castling_deploy.export.mil_ops import operations
from castling_deploy.export.mil_package import model_file, read_package
from castling_deploy.export.mil_shape_ops import UnsupportedOpError
from castling_deploy.export.mil_sums import Float16Sums, Float32Sums

Arrays = Sequence[npt.NDArray[np.generic]]
PLANE = (2, 4, 8, 6)


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.layers)


def noise(*shapes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def saved(
    module: nn.Module, inputs: Sequence[torch.Tensor], folder: Path, precision: str = "FLOAT32", target: str = "iOS17"
) -> Path:
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs)).run_decompositions({})
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            skip_model_load=True,
            compute_precision=getattr(ct.precision, precision),
            inputs=[
                ct.TensorType(name=f"x{index}", shape=tuple(x.shape), dtype=np.float32)
                for index, x in enumerate(inputs)
            ],
        )
    model.save(str(folder / "one.mlpackage"))
    return folder / "one.mlpackage"


def built(body: Callable[..., Any], shapes: Sequence[Sequence[int]], folder: Path) -> Path:
    """A program written operation by operation with coremltools' own builder; `body` takes x0, x1, ..."""
    float32 = ct.converters.mil.mil.types.fp32
    program = mb.program(
        input_specs=[mb.TensorSpec(shape=tuple(shape), dtype=float32) for shape in shapes],
        opset_version=ct.target.iOS17,
    )(body)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT32,
    )
    model.save(str(folder / "one.mlpackage"))
    return folder / "one.mlpackage"


def run(program: Program, inputs: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
    return list(program({f"x{index}": x.numpy() for index, x in enumerate(inputs)}).values())  # type: ignore[arg-type]


def pointwise(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    small, positive = x.tanh(), y * y + 0.5
    return (
        x.abs(),
        small.acos(),
        small.asin(),
        x.atan(),
        (0.9 * small).atanh(),
        x.ceil(),
        x.cos(),
        x.cosh(),
        torch.erf(x),
        x.exp(),
        x.exp2(),
        x.floor(),
        x.round(),
        x.sign(),
        x.sin(),
        x.sinh(),
        positive.sqrt(),
        x.tan(),
        positive.rsqrt(),
        positive.log(),
        x + y,
        x - y[0, 0, 0],
        x / positive,
        torch.floor_divide(x, positive),
        positive**x,
        torch.maximum(x, y),
        torch.minimum(x, y),
        x.clamp(-0.5, 0.7),
        F.threshold(x, 0.2, 0.2),
        (4 * x).int(),
    )


def comparisons(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    whole, other = x.round(), y.round()
    flags = (
        whole == other,
        torch.ne(whole, other),
        whole > other,
        torch.ge(whole, other),
        torch.lt(whole, other),
        whole <= other,
        torch.logical_and(x > 0, y > 0),
        torch.logical_or(x > 1, y > 1),
        torch.logical_xor(x > 2, y > 0),
        torch.logical_not(x > 3),
    )
    return (*(flag.float() for flag in flags), torch.where(x > y, x, 2 * y))


def activations(x: torch.Tensor, prelu: nn.Module) -> tuple[torch.Tensor, ...]:
    return (
        F.relu(x),
        F.relu6(3 * x),
        x.sigmoid(),
        F.gelu(x),
        F.elu(x, 0.7),
        F.leaky_relu(x, 0.1),
        F.silu(x),
        F.hardswish(2 * x),
        F.softplus(4 * x),
        prelu(x),
        x.softmax(1),
        F.log_softmax(x, -1),
    )


def reductions(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        x.sum((1, 2)),
        x.mean(-1, keepdim=True),
        x.amax((2, 3)),
        x.amin(1),
        torch.logsumexp(x, 1),
        torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        x.argmax(1),
        x.argmin(-1, keepdim=True),
        x.cumsum(1),
    )


def layered(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(layer(x) for layer in layers)


def products(x: torch.Tensor, y: torch.Tensor, linear: nn.Module) -> tuple[torch.Tensor, ...]:
    return linear(x), x @ y.mT, x.mT @ y, torch.einsum("bchq,bkhc->bkhq", x[:, :, :, :5], y[:, :3, :, :4])


def pooled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        F.max_pool2d(x, 3, 2, 1),
        F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        F.avg_pool2d(x, 3, 2, 1),
        F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        F.interpolate(x, scale_factor=2.0),
        F.interpolate(x, size=(12, 9)),
        F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        F.interpolate(x, size=(13, 9), mode="bilinear", align_corners=True),
    )


def layouts(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        x.reshape(2, -1, 4),
        x.permute(0, 2, 3, 1),
        x.unsqueeze(1),
        x[:, :1].squeeze(1),
        torch.cat([x, y], 1),
        torch.stack([x, y], 1),
        *x.split([1, 3], 1),
        *y.chunk(2, -1),
        F.pad(x[0], (0, 0, 1, 0)),
        F.pad(x, (1, 2, 2, 1), "reflect"),
        F.pad(x, (1, 2, 2, 1), "replicate"),
        F.pad(x, (1, 2), value=3.0),
        x.repeat(1, 2, 1, 1),
        x.flip(1, 3),
        F.pixel_shuffle(x, 2),
        F.pixel_unshuffle(x, 2),
    )


def selections(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    where = torch.tensor([[[[0, 1, 5, 2, 4, 3]]]])
    return (
        x[:, 1:, ::2, -3:],
        x[:, -1],
        x.narrow(1, 1, 2),
        x[:, torch.tensor([2, 0])],
        x.index_select(2, torch.tensor([3, 1, 1])),
        x.gather(3, where.expand(2, 4, 8, 6)),
        *x.topk(2, -1),
        x.tril(),
        x.roll(2, -1),
    )


CONVOLUTIONS = (
    nn.Conv2d(4, 6, 3, 2, 1),
    nn.Conv2d(4, 4, (9, 1), padding=(4, 0), groups=4, bias=False),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    nn.Conv2d(4, 6, 3, padding="same"),
    nn.Conv2d(4, 6, 1, groups=2),
    nn.ConvTranspose2d(4, 3, 3, 2, 1),
    nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
)
NORMS = (
    nn.LayerNorm(6),
    nn.LayerNorm((8, 6)),
    nn.LayerNorm(6, elementwise_affine=False),
    nn.BatchNorm2d(4),
    nn.InstanceNorm2d(4, affine=True),
)

GROUPS: dict[str, tuple[nn.Module, int, str]] = {
    "pointwise": (
        Lambda(pointwise),
        2,
        "abs acos asin atan atanh cast ceil clip cos cosh erf exp exp2 floor floor_div "
        "log maximum minimum pow real_div round rsqrt sign sin sinh sqrt sub tan tanh threshold add mul",
    ),
    "comparisons": (
        Lambda(comparisons),
        2,
        "equal not_equal greater greater_equal less less_equal logical_and logical_not logical_or logical_xor select",
    ),
    "activations": (
        Lambda(activations, nn.PReLU(4)),
        1,
        "relu relu6 sigmoid gelu elu leaky_relu silu sigmoid_hard thresholded_relu softplus prelu softmax",
    ),
    "reductions": (
        Lambda(reductions),
        1,
        "reduce_sum reduce_mean reduce_max reduce_min reduce_log_sum_exp "
        "reduce_l2_norm reduce_argmax reduce_argmin cumsum",
    ),
    "norms": (Lambda(layered, *NORMS), 1, "layer_norm batch_norm instance_norm"),
    "products": (Lambda(products, nn.Linear(6, 5)), 2, "linear matmul einsum"),
    "convolutions": (Lambda(layered, *CONVOLUTIONS), 1, "conv conv_transpose crop"),
    "planes": (Lambda(pooled), 1, "max_pool avg_pool upsample_nearest_neighbor upsample_bilinear"),
    "layouts": (
        Lambda(layouts),
        2,
        "reshape transpose expand_dims squeeze concat stack split pad tile reverse pixel_shuffle pixel_unshuffle",
    ),
    "selections": (Lambda(selections), 1, "slice_by_index gather gather_along_axis topk band_part"),
}


@pytest.fixture(autouse=True, scope="module")
def spread_parameters() -> None:
    """No gamma of one, no bias of zero, no slope shared: a parameter that is ignored would not be seen."""
    generator = torch.Generator().manual_seed(3)
    for module, _, _ in GROUPS.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)


@pytest.mark.parametrize("group", GROUPS)
def test_operations_compute_what_torch_computes(group: str, tmp_path: Path) -> None:
    module, count, expected = GROUPS[group]
    inputs = noise(*[PLANE] * count)
    program = load_program(saved(module, inputs, tmp_path))
    assert set(expected.split()) <= set(program.counts)
    with torch.no_grad():
        wanted = module(*inputs)
    for index, (got, want) in enumerate(zip(run(program, inputs), wanted, strict=True)):
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-5, atol=2e-6, err_msg=f"output {index} of {group}")


LEVELS = np.random.default_rng(0).integers(-127, 128, PLANE).astype(np.int8)
ZEROS, SCALES = np.arange(PLANE[2]).astype(np.int8), 0.01 * np.arange(1, PLANE[2] + 1).astype(np.float32)

TABLE, PLACES = np.linspace(-1, 2, 64, dtype=np.float32), [5, 63, 2, 17, 40, 1]
BYTES = sum(place << (6 * index) for index, place in enumerate(PLACES)).to_bytes(5, "little")


def unwritten(x0: Any, x1: Any) -> list[Any]:
    """Operations that coremltools never writes for torch."""
    x, y = x0, x1
    mask = mb.greater(x=x, y=y)
    return [
        mb.clamped_relu(x=x, alpha=0.3, beta=0.8),
        mb.linear_activation(x=x, alpha=0.3, beta=2.0),
        mb.scaled_tanh(x=x, alpha=0.3, beta=2.0),
        mb.softsign(x=x),
        mb.square(x=x),
        mb.mod(x=x, y=2.0),
        mb.inverse(x=x, epsilon=0.25),
        mb.l2_norm(x=x, epsilon=0.5),
        mb.reduce_l1_norm(x=x, axes=[1]),
        mb.reduce_log_sum(x=mb.square(x=x), axes=[2]),
        mb.reduce_prod(x=x, axes=[1, 3], keep_dims=True),
        mb.reduce_sum_square(x=x),
        mb.flatten2d(x=x, axis=2),
        mb.slice_by_size(x=x, begin=[0, 1, 2, 3], size=[2, 2, -1, 1]),
        mb.slice_by_index(x=x, begin=[1, 1, 1, -3], end=[2, 3, 3, -1], begin_mask=[False, True, False, False]),
        mb.expand_dims(x=mb.reduce_sum(x=x, axes=[1, 2]), axes=[-1, 0]),
        mb.concat(values=[x, y], axis=1, interleave=True),
        mb.identity(x=mb.cast(x=mask, dtype="int32")),
        mb.resize_nearest_neighbor(x=x, target_size_height=16, target_size_width=18),
        mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        mb.add(
            x=x,
            y=mb.constexpr_affine_dequantize(quantized_data=LEVELS, zero_point=ZEROS, scale=SCALES, axis=np.int32(2)),
        ),
        mb.add(
            x=x,
            y=mb.constexpr_lut_to_dense(
                indices=np.frombuffer(BYTES, np.uint8), lut=TABLE, shape=np.array([1, 6], np.uint32)
            ),
        ),
    ]


def documented(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The same, as coremltools documents them."""
    return [
        torch.minimum(x.clamp(min=0), torch.tensor(0.8)) + torch.minimum(0.3 * x.clamp(max=0), torch.tensor(0.8)),
        0.3 * x + 2,
        0.3 * (2 * x).tanh(),
        x / (1 + x.abs()),
        x * x,
        x - 2 * (x / 2).floor(),
        1 / (x + 0.25),
        x / ((x * x).sum((1, 2, 3), keepdim=True) + 0.5).sqrt(),
        x.abs().sum(1),
        (x * x).sum(2).log(),
        x.prod(1, keepdim=True).prod(3, keepdim=True),
        (x * x).sum(),
        x.reshape(8, 48),
        x[:, 1:3, 2:, 3:4],
        x[1:2, :3, 1:3, -3:-1],
        x.sum((1, 2))[None, :, :, None],
        torch.stack([x, y], 2).flatten(1, 2),
        (x > y).int(),
        x.repeat_interleave(2, 2).repeat_interleave(3, 3),
        F.gelu(x, approximate="tanh"),
        x * torch.sigmoid(1.702 * x),
        x + torch.from_numpy((LEVELS.astype(np.float32) - ZEROS[:, None]) * SCALES[:, None]),
        x + torch.from_numpy(TABLE[PLACES]),
    ]


UNWRITTEN = (
    "clamped_relu linear_activation scaled_tanh softsign square mod inverse l2_norm reduce_l1_norm gelu "
    "reduce_log_sum reduce_prod reduce_sum_square flatten2d expand_dims slice_by_index slice_by_size concat "
    "identity resize_nearest_neighbor constexpr_affine_dequantize constexpr_lut_to_dense"
)


def test_operations_that_torch_does_not_reach_compute_what_is_documented(tmp_path: Path) -> None:
    inputs = noise(PLANE, PLANE)
    program = load_program(built(unwritten, [PLANE, PLANE], tmp_path))
    assert set(UNWRITTEN.split()) <= set(program.counts)
    for index, (got, want) in enumerate(zip(run(program, inputs), documented(*inputs), strict=True)):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6, err_msg=f"output {index}")


def test_bilinear_grids_are_the_documented_examples(tmp_path: Path) -> None:
    examples = {
        "UNALIGN_CORNERS": [0, 0.1, 0.5, 0.9, 1],
        "STRICT_ALIGN_CORNERS": [0, 0.25, 0.5, 0.75, 1],
        "ALIGN_CORNERS": [0, 0.25, 0.5, 0.75, 1],
        "DEFAULT": [0, 0.4, 0.8, 1, 1],
        "OFFSET_CORNERS": [0.1, 0.3, 0.5, 0.7, 0.9],
    }
    program = load_program(
        built(
            lambda x0: [
                mb.resize_bilinear(x=x0, target_size_height=1, target_size_width=5, sampling_mode=mode)
                for mode in examples
            ],
            [(1, 1, 2)],
            tmp_path,
        )
    )
    for got, want in zip(run(program, [torch.tensor([[[0.0, 1.0]]])]), examples.values(), strict=True):
        np.testing.assert_allclose(got.ravel(), want, atol=1e-6)


def test_attention_of_ios18_computes_what_torch_computes(tmp_path: Path) -> None:
    q, k, v, mask = noise((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (5, 7))
    program = load_program(saved(Lambda(F.scaled_dot_product_attention), (q, k, v, mask), tmp_path, target="iOS18"))
    assert program.counts == {"scaled_dot_product_attention": 1}
    want = F.scaled_dot_product_attention(q, k, v, mask)
    np.testing.assert_allclose(run(program, (q, k, v, mask))[0], want.numpy(), atol=1e-6)


def test_every_operation_of_the_table_is_compared_in_this_file() -> None:
    compared = set(UNWRITTEN.split()).union(*(names.split() for _, _, names in GROUPS.values()))
    elsewhere = {"resize_bilinear", "scaled_dot_product_attention", "classify"}  # above, and in test_to_coreml.py
    assert set(operations(Float32Sums())) == compared | elsewhere


def test_defaults_of_parameters_are_those_of_coremltools() -> None:
    compared = 0
    for name, function in operations(Float32Sums()).items():
        versions = SSAOpRegistry.core_ops[name]
        operation = versions[max(versions, key=lambda target: target.value)]
        instance = SimpleNamespace(x=SimpleNamespace(rank=4))
        try:
            defaults = dict(operation.default_inputs(instance).items())
        except (AttributeError, TypeError):  # computed from more than the rank
            continue
        for parameter, value in inspect.signature(function).parameters.items():
            expected = defaults.get(parameter)
            if isinstance(expected, (int, float, str)) and value.default is not None:
                assert value.default == expected, f"{name}({parameter})"
                compared += 1
    assert compared > 30


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
