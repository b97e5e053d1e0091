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


class CastlingLeViT(nn.Module):
    """Castling-LeViT. Shape: (B, C, H, W) -> logits (B, classes); the pair of heads in distilled training."""

    fold_rule: ClassVar[str] = "heads merged"

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__()
        self.config = config
        first = config.widths[0]
        widths = [config.channels, first // 8, first // 4, first // 2, first]
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, 5):
            stem[f"conv{number}"] = ConvNorm(widths[number - 1], widths[number], 3, 2, 1)
            if number < 4:
                stem[f"act{number}"] = nn.Hardswish()
        self.stem = nn.Sequential(stem)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.widths)))
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
