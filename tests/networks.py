"""Small networks with conditioned random weights: different images give clearly different outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.levit import CastlingLeViT
from castling_deploy.models.levit_config import LeViTConfig
from castling_deploy.models.mvit import CastlingMViTv2
from castling_deploy.models.mvit_config import MViTv2Config

SMALL_DEIT = DeiTConfig(width=32, heads=2, depth=2, hidden=64, image_size=(32, 32), patch=8, classes=10)
SMALL_DISTILLED = DeiTConfig(
    width=32, heads=2, depth=2, hidden=64, image_size=(32, 48), patch=8, classes=10, distilled=True
)
SMALL_LEVIT = LeViTConfig(widths=(32, 48, 64), heads=(2, 3, 4), depths=(1, 1, 1), image_size=(64, 64), classes=10)
SMALL_MVIT = MViTv2Config(
    widths=(16, 32, 64, 128), heads=(1, 2, 4, 8), depths=(1, 1, 2, 1), image_size=(64, 96), classes=10
)
SMALL = {
    "deit": (CastlingDeiT, SMALL_DEIT),
    "deit-distilled": (CastlingDeiT, SMALL_DISTILLED),
    "levit": (CastlingLeViT, SMALL_LEVIT),
    "levit-linear": (CastlingLeViT, replace(SMALL_LEVIT, down="linear", image_size=(64, 96))),
    "mvit": (CastlingMViTv2, SMALL_MVIT),
}
# The same networks with their original attention. DeiT's heads have 64 channels, which the tensors do not tell.
BASELINES = {
    "deit-softmax": (CastlingDeiT, replace(SMALL_DEIT, width=128, attention="softmax")),
    "levit-softmax": (CastlingLeViT, replace(SMALL_LEVIT, attention="softmax")),
    "mvit-softmax": (CastlingMViTv2, replace(SMALL_MVIT, attention="softmax")),
}


def conditioned(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic re-drawn, in place: norms with spread-out scales and means, no zero gammas."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        elif parameter.ndim >= 2 and name.endswith("weight"):
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        else:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.5 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def small(name: str, seed: int = 0) -> nn.Module:
    build, config = {**SMALL, **BASELINES}[name]
    return conditioned(build(config), seed)  # type: ignore[arg-type]
