"""Small networks with conditioned random weights: different images give clearly different outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.dense import DenseConfig
from castling_deploy.models.detector import PicoDetHead
from castling_deploy.models.esnet import ESNetConfig
from castling_deploy.models.family import family_named
from castling_deploy.models.levit import CastlingLeViT
from castling_deploy.models.levit_config import LeViTConfig, up_to_stride_32
from castling_deploy.models.mvit import CastlingMViTv2
from castling_deploy.models.mvit_config import MViTv2Config
from castling_deploy.models.pico_head import PicoHead
from castling_deploy.models.segmenter import SemanticFpn
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import probes_for

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

# Families of two parts: a backbone and a head.
SMALL_PICO, SMALL_FPN = PicoDetHead(width=16, convs=1, reg_max=3), SemanticFpn(16)
_DENSE_LEVIT = up_to_stride_32(replace(SMALL_LEVIT, classes=1000), (64, 96))
_DENSE_MVIT = replace(SMALL_MVIT, classes=1000)
_DENSE_DEIT = replace(SMALL_DEIT, classes=1000, depth=4, patch=16, image_size=(64, 96))
_ESNET = ESNetConfig(stem=8, widths=(16, 24, 32), middles=((16, 8), (16, 24, 24), (32,)), image_size=(64, 96))
DENSE = {
    "levit-detector": ("castling-levit-detector", DenseConfig(_DENSE_LEVIT, SMALL_PICO, 3)),
    "mvitv2-detector": ("castling-mvitv2-detector", DenseConfig(_DENSE_MVIT, SMALL_PICO, 3)),
    "picodet": ("picodet", DenseConfig(_ESNET, SMALL_PICO, 3)),
    "deit-segmenter": ("castling-deit-segmenter", DenseConfig(_DENSE_DEIT, SMALL_FPN, 5)),
    "levit-segmenter": ("castling-levit-segmenter", DenseConfig(_DENSE_LEVIT, SMALL_FPN, 5)),
    "mvitv2-segmenter": ("castling-mvitv2-segmenter", DenseConfig(_DENSE_MVIT, SMALL_FPN, 5)),
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


def dense(name: str, seed: int = 0) -> nn.Module:
    family, config = DENSE[name]
    network = conditioned(family_named(family).build(config), seed)
    return with_statistics(network, torch.from_numpy(pictures(config.image_size)), seed)


def pictures(size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Real images, normalised: (8, 3, H, W)."""
    return probes_for(Preprocessing(size), None).tensors[:8]


def with_statistics(model: nn.Module, images: torch.Tensor, seed: int) -> nn.Module:
    """BatchNorm statistics near those of real images, in place: a deep convolutional network with statistics that have
    nothing to do with its weights multiplies its own rounding errors, and no float16 artefact of it can be judged."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        spread = norm.running_var.sqrt()
        norm.running_mean.add_(0.2 * spread * torch.randn(spread.shape, generator=generator))
        norm.running_var.mul_(0.7 + 0.6 * torch.rand(spread.shape, generator=generator))
        norm.running_var.clamp_(min=0.3 * norm.running_var.mean().item())  # no channel is all but constant
    for head in (module for module in model.modules() if isinstance(module, PicoHead)):
        for conv in head.gfl_cls:
            conv.weight.mul_(0.1)  # type: ignore[operator, union-attr]  # scores between the ends of the sigmoid
    return model.eval()
