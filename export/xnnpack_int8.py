"""Linears in 8 bits, in the operations that XNNPACK takes as one: a range for every token, found while it runs.

A Linear with int8 weights on such activations returns floats, so everything between two Linears stays as it is, and
nothing has to be calibrated. Each Linear quantises its input by itself: a quantisation that several of them read is
left outside the delegates, where ExecuTorch 1.5.1 has no kernel for it.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import TYPE_CHECKING

from castling_deploy.int8.quantised import weight_levels

if TYPE_CHECKING:
    from torch import Tensor, nn

    from castling_deploy.target import Quantisation


def in_8_bits(network: nn.Module, quantisation: Quantisation) -> nn.Module:
    """A copy of `network` (folded, float32) whose Linears in `quantisation` are written in 8 bits."""
    import torch
    from torch import nn

    import_module("executorch.exir.operator.util")  # defines torch.ops.quantized_decomposed
    ops = torch.ops.quantized_decomposed

    class TokenwiseLinear(nn.Module):
        """Shape: (..., N, C_in) -> (..., N, C_out)."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            levels, scales = weight_levels(linear.weight.detach())
            self.weight, self.scales = nn.Buffer(levels.to(torch.int8)), nn.Buffer(scales)
            self.zeros = nn.Buffer(torch.zeros(len(scales), dtype=torch.int64))
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
            tokens = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
            tokens = ops.dequantize_per_token(tokens, scale, zero, -128, 127, torch.int8, torch.float32)
            weight = ops.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8)
            return nn.functional.linear(tokens, weight, self.bias)

    twin = copy.deepcopy(network)
    for path in quantisation.ranges:
        linear = twin.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        twin.set_submodule(path, TokenwiseLinear(linear))
    return twin.eval()
