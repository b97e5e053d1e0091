"""Castling-MViTv2: MViTv2 (Li et al., CVPR 2022; facebookresearch/mvit) with linear-angular attention.

State-dict names are those of timm's MViTv2; the attention adds `attn.dconv.weight`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from castling_deploy.fold import (
    affine_before,
    layernorm_affine,
    without_affine,
)
from castling_deploy.models.layers import Mlp
from castling_deploy.models.mvit_attention import (
    FoldedPoolingAttention,
    FoldedPoolingSoftmax,
    PoolingAttention,
    as_map,
    as_tokens,
)
from castling_deploy.models.mvit_config import EPS, PATCH_STRIDE, MViTv2Config, Place, place_of
from castling_deploy.rewrite import copied


class Block(nn.Module):
    """Pre-norm block; where the channels grow, the shortcut is a Linear of the *normalised* input.

    Shape: (B, h * w, C_in) -> (B, h' * w', C).
    """

    fold_rule: ClassVar[str] = "LayerNorm affine into consumers"

    def __init__(self, place: Place, config: MViTv2Config) -> None:
        super().__init__()
        self.place = place
        self.norm1 = nn.LayerNorm(place.width_in, EPS)
        self.attn: nn.Module = PoolingAttention(place, config)
        grows = place.width_in != place.width
        self.shortcut_proj_attn = nn.Linear(place.width_in, place.width) if grows else None
        self.shortcut_pool_attn = nn.MaxPool2d(3, place.stride, 1) if place.stride > 1 else None
        self.norm2 = nn.LayerNorm(place.width, EPS)
        self.mlp = Mlp(place.width, config.mlp_ratio * place.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        shortcut = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(normed)
        if self.shortcut_pool_attn is not None:
            shortcut = as_tokens(self.shortcut_pool_attn(as_map(shortcut, self.place.grid)))
        x = shortcut + self.attn(normed)
        return x + self.mlp(self.norm2(x))

    def folded(self) -> nn.Module:
        assert isinstance(self.attn, (FoldedPoolingAttention, FoldedPoolingSoftmax))
        twin = copied(self)
        assert isinstance(twin, Block)
        first, second = layernorm_affine(self.norm1), layernorm_affine(self.norm2)
        twin.norm1, twin.attn = without_affine(self.norm1), self.attn.after(first)
        twin.norm2, twin.mlp = without_affine(self.norm2), self.mlp.after(second)
        if self.shortcut_proj_attn is not None:
            twin.shortcut_proj_attn = affine_before(self.shortcut_proj_attn, first)
        return twin


class Stage(nn.Module):
    """The blocks of one resolution. Shape: (B, h * w, C_in) -> (B, h' * w', C)."""

    def __init__(self, config: MViTv2Config, stage: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(place_of(config, stage, block), config) for block in range(config.depths[stage])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def patch_embedding(config: MViTv2Config) -> nn.ModuleDict:
    """Overlapping patches: (B, channels, H, W) -> (B, widths[0], H / 4, W / 4)."""
    return nn.ModuleDict({"proj": nn.Conv2d(config.channels, config.widths[0], 7, PATCH_STRIDE, 3)})


def stages(config: MViTv2Config) -> nn.ModuleList:
    """All stages, one after the other."""
    return nn.ModuleList(Stage(config, stage) for stage in range(len(config.widths)))


def initialise(network: nn.Module) -> None:
    """Fresh weights, in place, as in facebookresearch/mvit."""
    for name, parameter in network.named_parameters():
        if name.endswith((".rel_pos_h", ".rel_pos_w")):
            nn.init.trunc_normal_(parameter, std=0.02)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class MViTv2Backbone(nn.Module):
    """Castling-MViTv2 without its last norm and its head: (B, C, H, W) -> maps of strides 4, 8, 16, 32."""

    def __init__(self, config: MViTv2Config) -> None:
        super().__init__()
        self.grids = config.grids
        self.patch_embed, self.stages = patch_embedding(config), stages(config)
        initialise(self)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, maps = as_tokens(self.patch_embed["proj"](image)), []
        for stage, grid in zip(self.stages, self.grids, strict=True):
            x = stage(x)
            maps.append(as_map(x, grid))
        return tuple(maps)


class CastlingMViTv2(nn.Module):
    """Castling-MViTv2 without a class token. Shape: (B, C, H, W) -> logits (B, classes)."""

    fold_rule: ClassVar[str] = "LayerNorm affine through the token mean"

    def __init__(self, config: MViTv2Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed, self.stages = patch_embedding(config), stages(config)
        self.norm = nn.LayerNorm(config.widths[-1], EPS)
        self.head = nn.ModuleDict({"fc": nn.Linear(config.widths[-1], config.classes)})
        initialise(self)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = as_tokens(self.patch_embed["proj"](image))  # (B, N, C)
        for stage in self.stages:
            x = stage(x)
        return self.head["fc"](self.norm(x).mean(1))

    def folded(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, CastlingMViTv2)
        head = twin.head["fc"]
        assert isinstance(head, nn.Linear)
        twin.head["fc"] = affine_before(head, layernorm_affine(self.norm))
        twin.norm = without_affine(self.norm)
        return twin
