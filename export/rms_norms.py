"""LayerNorms of tokens without mean, as RMSNorms: for a format that has no kernel for a LayerNorm.

XNNPACK computes a mean as a Linear with one output. Without it and its subtraction, Castling-DeiT-T takes 0.981
of the time in float32 and 0.965 in int8 (ExecuTorch 1.5.1, medians of 150 interleaved pairs, one thread, 224 pixels).

Weights in 8 bits are rounded after their mean was taken out, so tokens in int8 have a small one, which the network that
the artefact is compared with subtracts: the bundled DeiT's rung `exported` is 5e-3, its limit 3e-2.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def in_rms_norms(network: nn.Module) -> nn.Module:
    """A copy of `network` (folded) whose LayerNorms of tokens without mean are RMSNorms: equal in real arithmetic."""
    from torch import nn

    from castling_deploy.fold import ZeroMeanNorm

    twin = copy.deepcopy(network)
    for path, norm in network.named_modules():
        if isinstance(norm, ZeroMeanNorm):
            twin.set_submodule(path, nn.RMSNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))
    return twin.eval()
