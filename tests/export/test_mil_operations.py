"""The operations of the evaluator of Core ML programs, one by one against torch and against what is documented."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from mil_programs import PLANE, Lambda, built, noise, run, saved
from torch import nn
from torch.nn import functional as F

from castling_deploy.export.mil_evaluator import load_program
from castling_deploy.export.mil_ops import operations
from castling_deploy.export.mil_sums import Float32Sums

Arrays = Sequence[npt.NDArray[np.generic]]


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
