"""A network whose Linears compute in 8 bits, in PyTorch: what an int8 artefact is compared with.

Arithmetic as ONNX Runtime, TensorRT, XNNPACK and Core ML define it: activations in one scale per tensor or per token,
or as they are, weights in one scale per output channel. Here it is done in floats that hold the same integers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from castling_deploy.eight_bits import Activations, Quantisation, weight_levels


class QuantisedLinear(nn.Module):
    """A Linear on 8-bit activations and weights. Shape: (..., C_in) -> (..., C_out)."""

    def __init__(self, linear: nn.Linear, quantisation: Quantisation, path: str) -> None:
        super().__init__()
        levels, scales = map(torch.from_numpy, weight_levels(linear.weight.detach().numpy()))
        self.weight = nn.Buffer(levels * scales[:, None])
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach().clone())
        self.activations, self.levels = quantisation.activations, None
        if self.activations.calibrated:
            self.levels = quantisation.scale(path)
            if self.bias is not None:
                steps = scales * self.levels[0]  # (C_out,)
                self.bias = nn.Buffer((self.bias / steps).round() * steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.levels is not None:
            x = rounded(x, *self.levels)
        elif self.activations is Activations.PER_TOKEN:
            x = rounded_per_token(x)
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


def quantised(network: nn.Module, quantisation: Quantisation) -> nn.Module:
    """A copy of `network` (folded, float32) whose Linears in `quantisation` compute in 8 bits."""
    twin = copy.deepcopy(network)
    for path in quantisation.ranges:
        linear = twin.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        twin.set_submodule(path, QuantisedLinear(linear, quantisation, path))
    return twin.eval()
