"""Linears in 8 bits in torch's operations for it, for the formats whose converters keep them.

For XNNPACK a Linear with int8 weights, on tokens that are quantised while it runs, is one operation that returns
floats: everything between two Linears stays as it is, and nothing has to be calibrated. Each Linear quantises its input
by itself: a quantisation that several of them read is left outside the delegates, where ExecuTorch 1.5.1 has no kernel
for it. Core ML and Core AI keep int8 weights beside their scales, or indices beside a table, and compute in float16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from castling_deploy.eight_bits import GROUP, Activations
from castling_deploy.export.torch_palette import palettised_linear

if TYPE_CHECKING:
    from torch import Tensor, nn

    from castling_deploy.eight_bits import Quantisation


def in_8_bits(network: nn.Module, quantisation: Quantisation) -> nn.Module:
    """A copy of `network` (folded, float32) in eval mode whose Linears in `quantisation` are written in 8 bits.

    Their activations are quantised for every token, or not at all.
    """
    from torch import nn

    assert quantisation.activations in (Activations.PER_TOKEN, Activations.FLOAT16)
    palette = quantisation.palette
    made = linear_in_levels(quantisation) if palette is None else palettised_linear(palette)
    twin = copy.deepcopy(network)
    for path in quantisation.ranges:
        linear = twin.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        twin.set_submodule(path, made(linear))
    return twin.eval()


def linear_in_levels(quantisation: Quantisation) -> Callable[[nn.Linear], nn.Module]:
    """What makes of a float32 Linear one with weights in 8 bits and a scale for every output channel, or in 4 bits."""
    import torch
    from torch import nn

    import_module("torch.ao.quantization.fx._decomposed")  # defines torch.ops.quantized_decomposed
    ops = torch.ops.quantized_decomposed
    per_token = quantisation.activations is Activations.PER_TOKEN

    class Linear(nn.Module):
        """Shape: (..., N, C_in) -> (..., N, C_out)."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            made = quantisation.levels_of(linear.weight.detach().numpy())
            self.weight, self.scales = map(nn.Buffer, map(torch.from_numpy, made))
            self.zeros = nn.Buffer(torch.zeros(self.scales.shape, dtype=torch.int64))
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            if per_token:
                scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
                x = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
                x = ops.dequantize_per_token(x, scale, zero, -128, 127, torch.int8, torch.float32)
            if self.scales.dim() == 2:
                weight = ops.dequantize_per_channel_group(
                    self.weight, self.scales, self.zeros, -8, 7, torch.int8, GROUP, torch.float32
                )
                return nn.functional.linear(x, weight, self.bias)
            dtype = self.scales.dtype  # float16 where the network was narrowed; coremltools 9.0 takes no out_dtype
            kind = {} if dtype is torch.float32 else {"out_dtype": dtype}
            weight = ops.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8, **kind)
            return nn.functional.linear(x, weight, self.bias)

    return Linear
