"""A network whose Linears compute in 8 bits, in PyTorch: what an int8 artefact is compared with.

Arithmetic as ONNX Runtime, TensorRT and XNNPACK define it: activations in one scale per tensor or per token, weights in
one per output channel, products added in int32. Here it is done in floats that hold the same integers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from castling_deploy.target import WEIGHT_LEVELS, Activations, Quantisation


class QuantisedLinear(nn.Module):
    """A Linear on 8-bit activations and weights. Shape: (..., C_in) -> (..., C_out)."""

    def __init__(self, linear: nn.Linear, quantisation: Quantisation, path: str) -> None:
        super().__init__()
        levels, scales = weight_levels(linear.weight.detach())
        self.weight = nn.Buffer(levels * scales[:, None])
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach().clone())
        self.levels = None
        if quantisation.activations is not Activations.PER_TOKEN:
            self.levels = quantisation.scale(path)
            if self.bias is not None:
                steps = scales * self.levels[0]  # (C_out,)
                self.bias = nn.Buffer((self.bias / steps).round() * steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = rounded_per_token(x) if self.levels is None else rounded(x, *self.levels)
        return nn.functional.linear(x, self.weight, self.bias)


def rounded(
    x: torch.Tensor, scale: float | torch.Tensor, zero: int | torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """x as activations in 8 bits hold it: the nearest level, clipped to the range."""
    return (x / scale).round().add(zero).clamp(lowest, highest).sub(zero) * scale


def rounded_per_token(x: torch.Tensor) -> torch.Tensor:
    """(..., N, C) as XNNPACK rounds it while it runs: every token between its own least and largest value, and zero.

    As xnn_f32_qd8_asymmetric_quantization_params of XNNPACK (src/xnnpack/quantization.h) sets scale and zero point.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    return rounded(x, scale, (-128 - low / scale).round(), -128, 127)


def weight_levels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C_out, C_in) -> whole numbers from -127 to 127, and the scale of every output channel (C_out,)."""
    scales = weight.abs().amax(1) / WEIGHT_LEVELS
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight / scales[:, None]).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS), scales


def quantised(network: nn.Module, quantisation: Quantisation) -> nn.Module:
    """A copy of `network` (folded, float32) whose Linears in `quantisation` compute in 8 bits."""
    twin = copy.deepcopy(network)
    for path in quantisation.ranges:
        linear = twin.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        twin.set_submodule(path, QuantisedLinear(linear, quantisation, path))
    return twin.eval()
