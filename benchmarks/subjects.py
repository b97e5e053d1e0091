"""What is timed: a network as it was trained, cast, folded, with softmax, and its Linears and convolutions alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.fold import fold
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.deit_config import VARIANTS as DEIT
from castling_deploy.models.levit import CastlingLeViT
from castling_deploy.models.levit_config import VARIANTS as LEVIT
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.target import Network, TensorSpec

BUILDERS: dict[str, tuple[Any, Any]] = {
    **{f"castling-deit-{size}": (CastlingDeiT, DEIT[f"castling-deit-{size}"]) for size in ("tiny", "small", "base")},
    "castling-levit-128s": (CastlingLeViT, LEVIT["castling-levit-128s"]),
}


@cache
def trained(name: str, size: int, attention: str = "castling") -> nn.Module:
    """A network with random weights and statistics: they cost the same time as trained ones."""
    build, config = BUILDERS[name]
    torch.manual_seed(0)
    network: nn.Module = build(replace(config, image_size=(size, size), attention=attention))
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@cache
def cast(name: str, size: int) -> nn.Module:
    """As written: cast and not folded."""
    return castle(trained(name, size)).eval()


@cache
def folded(name: str, size: int) -> nn.Module:
    return fold(cast(name, size)).eval()


def handed(name: str, size: int) -> Network:
    """What an exporter is handed."""
    image = TensorSpec("image", (1, 3, size, size), "float32", "NCHW")
    logits = TensorSpec("logits", (1, 1000), "float32", "NC")
    return Network(name, folded(name, size), (image,), (logits,), Preprocessing((size, size)), None, name, {})


@dataclass(frozen=True)
class Step:
    """One Linear or convolution, and the shape that it is given."""

    module: nn.Module
    shape: tuple[int, ...]


class Floor(nn.Module):
    """The patch embedding or stem and the weight-Linears of a network as written, one after the other, each given what
    the one before returned, cut to its shape. No norm, no attention, no activation."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.steps: list[Step] = []
        hooks = [
            module.register_forward_hook(
                lambda module, given, _: self.steps.append(Step(module, tuple(given[0].shape)))
            )
            for module in network.modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        ]
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
        for hook in hooks:
            hook.remove()
        self.kept = nn.ModuleList(step.module for step in self.steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step.module(shaped(x, step.shape))
        return x


def shaped(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Any numbers of `x` in `shape`, as cheaply as can be: a slice of the channels, or of all numbers."""
    if tuple(x.shape) == shape:
        return x
    if x.ndim == len(shape) == 3 and x.shape[1] == shape[1] and x.shape[2] > shape[2]:
        return x[..., : shape[2]]
    count = torch.Size(shape).numel()
    while x.numel() < count:
        x = torch.cat([x.flatten(), x.flatten()])
    return x.flatten()[:count].reshape(shape)
