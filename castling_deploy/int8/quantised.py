"""A network whose Linears and convolutions compute in 8 bits, in PyTorch: what an int8 artefact is compared with.

Arithmetic as ONNX Runtime, TensorRT, XNNPACK and Core ML define it: activations in one scale per tensor or per token,
or as they are, weights in one scale per output channel. Here it is done in floats that hold the same integers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.palette import palettised


class QuantisedLinear(nn.Module):
    """A Linear on 8-bit weights and activations in 8 or 16 bits. Shape: (..., C_in) -> (..., C_out)."""

    def __init__(self, linear: nn.Linear, quantisation: Quantisation, path: str) -> None:
        super().__init__()
        self.activations, self.levels = quantisation.activations, None
        if self.activations.calibrated:
            self.levels = quantisation.scale(path)
        self.result = quantisation.result_scale(path) if path in quantisation.results else None
        self.weight, self.bias = as_stored(linear, quantisation, self.levels[0] if self.levels else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.levels is not None:
            x = rounded(x, *self.levels)
        elif self.activations is Activations.PER_TOKEN:
            x = rounded_per_token(x)
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.result is None else rounded(y, *self.result)


class QuantisedConv(nn.Module):
    """A convolution on 8-bit activations and weights, which returns 8 bits.

    Shape: (B, C_in, H, W) -> (B, C_out, H', W').
    """

    def __init__(self, conv: nn.Conv2d, quantisation: Quantisation, path: str) -> None:
        super().__init__()
        self.given, self.result = quantisation.scale(path), quantisation.result_scale(path)
        self.weight, self.bias = as_stored(conv, quantisation, self.given[0])
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.conv2d(
            rounded(x, *self.given), self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        return rounded(y, *self.result)


def as_stored(
    module: nn.Linear | nn.Conv2d, quantisation: Quantisation, given_scale: float | None
) -> tuple[nn.Buffer, nn.Buffer | None]:
    """Weight and bias as levels or a table and, where the scale of what the module is given is known, 32 bits hold
    them.
    """
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach().clone()
    if quantisation.palette is not None:
        indices, table = map(torch.from_numpy, palettised(weight.numpy(), quantisation.palette))
        weight = table.float()[indices.long()]
    else:
        shift = None if bias is None else bias.numpy()
        levels, scales = map(torch.from_numpy, quantisation.levels_of(weight.flatten(1).numpy(), shift, given_scale))
        if bias is not None and given_scale is not None:
            steps = scales * given_scale  # (C_out,)
            bias = (bias / steps).round() * steps
        weight = (levels.reshape(*scales.shape, -1) * scales[..., None]).view_as(weight)
    return nn.Buffer(weight), None if bias is None else nn.Buffer(bias)


def rounded(
    x: torch.Tensor, scale: float | torch.Tensor, zero: int | torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """x as activations in levels hold it: the nearest one, clipped to the range."""
    return (x / scale).round().add(zero).clamp(lowest, highest).sub(zero) * scale


def rounded_per_token(x: torch.Tensor) -> torch.Tensor:
    """(..., N, C) as XNNPACK rounds it while it runs: every token between its own least and largest value, and zero.

    As xnn_f32_qd8_asymmetric_quantization_params of XNNPACK (src/xnnpack/quantization.h) sets scale and zero point.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    return rounded(x, scale, (-128 - low / scale).round(), -128, 127)


def quantised(network: nn.Module, quantisation: Quantisation) -> nn.Module:
    """A copy of `network` (folded, float32) whose modules in `quantisation` compute in 8 bits."""
    twin = copy.deepcopy(network)
    for path in quantisation.ranges:
        twin.set_submodule(path, quantised_module(twin, quantisation, path))
    return twin.eval()


def quantised_module(network: nn.Module, quantisation: Quantisation, path: str) -> QuantisedLinear | QuantisedConv:
    """What stands in the place of the module `path`."""
    module = network.get_submodule(path)
    if isinstance(module, nn.Conv2d):
        return QuantisedConv(module, quantisation, path)
    assert isinstance(module, nn.Linear)
    return QuantisedLinear(module, quantisation, path)
