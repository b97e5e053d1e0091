"""The forms for XNNPACK: exact, in place of every operation that they promise to replace, and of no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from folded_networks import folded_network
from networks import SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from castling_deploy.export.xnnpack_forms import in_xnnpack_forms, layer_norm, rms_norm, vector_norm

aten = torch.ops.aten
generator = torch.Generator().manual_seed(0)


class Calls(nn.Module):
    """A function as a module, with the tensor `weight` in it."""

    def __init__(self, function: Callable[..., Tensor], *weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.ParameterList(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weight)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def traced(module: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (x,))


def operations(program: torch.export.ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


COVERED = {
    "LayerNorm": (Calls(lambda x: F.layer_norm(x, (12,), eps=1e-2)), aten.layer_norm.default),
    "LayerNorm with affine": (
        Calls(lambda x, w, b: F.layer_norm(x, (12,), w, b), random(12), random(12)),
        aten.layer_norm.default,
    ),
    "RMSNorm": (Calls(lambda x: F.rms_norm(x, (12,), eps=1e-2)), aten.rms_norm.default),
    "RMSNorm with weight": (Calls(lambda x, w: F.rms_norm(x, (12,), w, 1e-6), random(12)), aten.rms_norm.default),
    "norm": (Calls(lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)), aten.linalg_vector_norm.default),
    "norm without its axis": (Calls(lambda x: torch.linalg.vector_norm(x, dim=3)), aten.linalg_vector_norm.default),
    "mean over tokens": (Calls(lambda x: x.mean(2)), aten.mean.dim),
    "mean that keeps its axis": (Calls(lambda x: x.mean(-3, keepdim=True)), aten.mean.dim),
    "mean of a map": (Calls(lambda x: x.mean((-1, 2), keepdim=True)), aten.mean.dim),
    "select": (Calls(lambda x: x[:, 0]), aten.select.int),
    "select from the end": (Calls(lambda x: x[..., -2, :]), aten.select.int),
}
SLICES = {
    "even": lambda x: x[:, :, ::2],
    "odd": lambda x: x[:, ::2],
    "last axis": lambda x: x[..., ::5],
    "with bounds": lambda x: x[:, :, 1:-2:3],
    "from the end": lambda x: x[:, :, -7::2],
}
CONVOLUTIONS = {"9 taps": {"padding": (4, 0)}, "stride": {"stride": (2, 1)}, "dilation": {"dilation": (1, 3)}}


@pytest.mark.parametrize("name", COVERED)
def test_operation_is_replaced_exactly(name: str) -> None:
    module, operation = COVERED[name]
    x = random(2, 3, 10, 12)
    program = traced(module, x)
    rewritten = in_xnnpack_forms(program)
    assert operation in operations(program) and operation not in operations(rewritten)
    assert relative_error(rewritten.module()(x), module(x)) < 1e-14


@pytest.mark.parametrize("name", SLICES)
def test_strided_slice_becomes_slices_without_stride(name: str) -> None:
    x = random(2, 3, 10, 12)
    module = Calls(SLICES[name])
    rewritten = in_xnnpack_forms(traced(module, x))
    slices = [node for node in rewritten.graph.nodes if node.target is aten.slice.Tensor]
    assert slices and all(len(node.args) < 5 or node.args[4] == 1 for node in slices)
    assert torch.equal(rewritten.module()(x), module(x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_column_of_a_token_convolution_becomes_a_channel(name: str) -> None:
    x, options = random(2, 3, 30, 12), CONVOLUTIONS[name]
    module = Calls(lambda x, w: F.conv2d(x, w, groups=3, **options), random(3, 1, 9, 1))
    rewritten = in_xnnpack_forms(traced(module, x))
    (conv,) = (node for node in rewritten.graph.nodes if node.target is aten.conv2d.default)
    assert conv.args[0].meta["val"].shape == (2, 36, 30, 1)
    assert relative_error(rewritten.module()(x), module(x)) < 1e-14


UNCOVERED = {
    "norm of another order": Calls(lambda x: torch.linalg.vector_norm(x, 1, dim=-1)),
    "norm over another axis": Calls(lambda x: torch.linalg.vector_norm(x, dim=1)),
    "norm over all": Calls(torch.linalg.vector_norm),
    "LayerNorm over two axes": Calls(lambda x: F.layer_norm(x, (10, 12))),
    "RMSNorm over two axes": Calls(lambda x: F.rms_norm(x, (10, 12), eps=1e-6)),
    "mean over two axes that go": Calls(lambda x: x.mean((2, 3))),
    "mean over two other axes": Calls(lambda x: x.mean((1, 2), keepdim=True)),
    "mean of a map of one row": Calls(lambda x: x[:, :, :1].mean((2, 3), keepdim=True)),
    "mean over all": Calls(lambda x: x.mean()),
    "3x3 depthwise convolution": Calls(lambda x, w: F.conv2d(x, w, groups=3), random(3, 1, 3, 3)),
    "dense column convolution": Calls(lambda x, w: F.conv2d(x, w), random(4, 3, 9, 1)),
    "convolution with padded columns": Calls(lambda x, w: F.conv2d(x, w, padding=1, groups=3), random(3, 1, 3, 1)),
    "convolution with a bias": Calls(lambda x, w, b: F.conv2d(x, w, b, groups=3), random(3, 1, 3, 1), random(3)),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_stays_as_it_is(name: str) -> None:
    module, x = UNCOVERED[name], random(2, 3, 10, 12)
    program = traced(module, x)
    rewritten = in_xnnpack_forms(program)
    assert operations(rewritten) == operations(program)
    assert relative_error(rewritten.module()(x), module(x)) < 1e-14


@pytest.mark.parametrize("name", SMALL)
def test_rewritten_network_is_exact_in_float64(name: str) -> None:
    network = folded_network(name, batch=2)
    module = network.module.double()
    x = network.example()[0].double()
    rewritten = in_xnnpack_forms(traced(module, x))
    assert relative_error(rewritten.module()(x), module(x)) < 1e-12


@pytest.mark.parametrize("size", [1e-3, 1.0, 5e2])
def test_float16_norms_neither_overflow_nor_vanish(size: float) -> None:
    """The plain square sum of the largest of these is infinite in float16, and that of the smallest is zero."""
    x = (size * random(3, 64)).half()
    exact = x.double()
    assert relative_error(vector_norm(x, dim=[-1], keepdim=True), exact.norm(dim=-1, keepdim=True)) < 3e-3
    assert relative_error(layer_norm(x, [64], eps=1e-6), F.layer_norm(exact, (64,), eps=1e-6)) < 5e-3
    assert relative_error(rms_norm(x, [64], eps=1e-6), F.rms_norm(exact, (64,), eps=1e-6)) < 5e-3
    assert vector_norm(torch.zeros_like(x), dim=[-1]).eq(0).all()


def test_float16_scalars_are_constants_of_the_file() -> None:
    module = Calls(lambda x: x * 0.637)
    x = random(2, 8).half()
    rewritten = in_xnnpack_forms(traced(module, x))
    (product,) = (node for node in rewritten.graph.nodes if node.target is aten.mul.Tensor)
    assert product.args[1].meta["val"].dtype == torch.float16
    assert relative_error(rewritten.module()(x), x.double() * 0.637) < 2e-3
