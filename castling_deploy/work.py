"""What a network costs: its weights, and the multiply-accumulates of one run."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from castling_deploy.catalogue import Work
from castling_deploy.rewrite import copied


def parameters(network: nn.Module) -> int:
    """Number of weights; what folding made a constant is none."""
    return sum(parameter.numel() for parameter in network.parameters())


def work_of(network: nn.Module, shape: tuple[int, ...]) -> Work:
    """Weights and multiply-accumulates for an input of this shape. Shapes alone tell: nothing is computed.

    Autograd stays on, so that no attention is cut into slices: counting 256 of them takes seconds.
    """
    with FlopCounterMode(display=False) as counter:
        copied(network).to("meta")(torch.zeros(shape, device="meta"))
    return Work(parameters(network), counter.get_total_flops() // 2)
