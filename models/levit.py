"""Castling-LeViT: LeViT (Graham et al., ICCV 2021; facebookresearch/LeViT levit.py) with linear-angular attention.

State-dict names are those of timm's LeViT; the attention adds `attn.dconv.weight`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.fold import mean_of
from castling_deploy.models.family import (
    Size,
)
from castling_deploy.models.layers import ConvNorm, LinearNorm, NormLinear
from castling_deploy.models.levit_attention import Attention, AttentionDownsample
from castling_deploy.models.levit_config import LeViTConfig
from castling_deploy.rewrite import copied


def mlp(width: int) -> nn.Sequential:
    """LeViT's Mlp: (B, N, C) -> (B, N, C) through 2 C channels."""
    return nn.Sequential(
        OrderedDict(ln1=LinearNorm(width, 2 * width), act=nn.Hardswish(), ln2=LinearNorm(2 * width, width, gamma=0))
    )


class Block(nn.Module):
    """Attention and Mlp, each with a residual connection. Shape: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int, config: LeViTConfig, grid: Size) -> None:
        super().__init__()
        self.attn = Attention(width, heads, config, grid)
        self.mlp = mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Downsample(nn.Module):
    """Downsampling attention, then an Mlp with a residual connection. Shape: (B, N, C_in) -> (B, N', C_out)."""

    def __init__(self, width_in: int, width_out: int, config: LeViTConfig, grid: Size) -> None:
        super().__init__()
        self.attn_downsample = AttentionDownsample(width_in, width_out, config, grid)
        self.mlp = mlp(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn_downsample(x)
        return x + self.mlp(x)


class Stage(nn.Module):
    """A downsampling (but for the first stage) and its blocks. Shape: (B, N, C_in) -> (B, N', C)."""

    def __init__(self, config: LeViTConfig, stage: int) -> None:
        super().__init__()
        width, grids = config.widths[stage], config.grids
        self.downsample = (
            Downsample(config.widths[stage - 1], width, config, grids[stage - 1]) if stage else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            Block(width, config.heads[stage], config, grids[stage]) for _ in range(config.depths[stage])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


def stem(config: LeViTConfig) -> nn.Sequential:
    """Four convolutions of stride 2: (B, channels, H, W) -> (B, widths[0], ceil(H / 16), ceil(W / 16))."""
    widths = [config.channels, *stem_widths(config)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, 5):
        layers[f"conv{number}"] = ConvNorm(widths[number - 1], widths[number], 3, 2, 1)
        if number < 4:
            layers[f"act{number}"] = nn.Hardswish()
    return nn.Sequential(layers)


def stem_widths(config: LeViTConfig) -> tuple[int, ...]:
    """Channels after each convolution of the stem."""
    first = config.widths[0]
    return first // 8, first // 4, first // 2, first


def stages(config: LeViTConfig) -> nn.ModuleList:
    """The stages after the stem."""
    return nn.ModuleList(Stage(config, stage) for stage in range(len(config.widths)))


class LeViTBackbone(nn.Module):
    """Castling-LeViT without its heads: what it sees at every scale.

    Shape: (B, C, H, W) -> maps of strides 4 and 8 (the stem's second and third convolution, after their activations),
    and of strides 16, 32, ... (the stages). The first three are rounded up where the size is no multiple of a stride.
    """

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__()
        self.grids = config.grids
        self.stem, self.stages = stem(config), stages(config)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps, x = [], image
        for name, layer in self.stem.named_children():
            x = layer(x)
            if name in ("act2", "act3"):
                maps.append(x)
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        for stage, grid in zip(self.stages, self.grids, strict=True):
            x = stage(x)
            maps.append(x.transpose(1, 2).unflatten(2, grid))  # (B, C, h, w)
        return tuple(maps)


class CastlingLeViT(nn.Module):
    """Castling-LeViT. Shape: (B, C, H, W) -> logits (B, classes); the pair of heads in distilled training."""

    fold_rule: ClassVar[str] = "heads merged"

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem, self.stages = stem(config), stages(config)
        self.head: nn.Module = NormLinear(config.widths[-1], config.classes)
        self.head_dist = NormLinear(config.widths[-1], config.classes) if config.distilled else None

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(image).flatten(2).transpose(1, 2)  # (B, N, C)
        for stage in self.stages:
            x = stage(x)
        x = x.mean(1)
        if self.head_dist is None:
            return self.head(x)
        pair = self.head(x), self.head_dist(x)
        return pair if self.training else (pair[0] + pair[1]) / 2

    def folded(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, CastlingLeViT)
        heads = [head for head in (self.head, self.head_dist) if isinstance(head, nn.Linear)]
        twin.head, twin.head_dist = mean_of(heads), None
        return twin
