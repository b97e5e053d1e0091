"""Castling-DeiT: DeiT (Touvron et al., ICML 2021; facebookresearch/deit models.py) with linear-angular attention.

Plain and distilled. State-dict names are those of facebook's and timm's DeiT; the attention adds `attn.dconv.weight`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.errors import FoldError
from castling_deploy.fold import affine_before, layernorm_affine, mean_of_each, without_affine
from castling_deploy.models.attention import (
    FoldedAttention,
    FoldedSoftmaxAttention,
    LinearAngularAttention,
    SoftmaxAttention,
)
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.layers import Mlp


class Block(nn.Module):
    """Pre-norm transformer block. Shape: (B, N, C) -> (B, N, C)."""

    fold_rule: ClassVar[str] = "LayerNorm affine into consumers"

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        tokens = config.prefix + math.prod(config.grid)
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn: nn.Module = (
            SoftmaxAttention(config.width, config.heads, config.qkv_bias)
            if config.attention == "softmax"
            else LinearAngularAttention(
                config.width, config.heads, config.qkv_bias, config.kernel, config.aux_threshold, tokens
            )
        )
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def folded(self) -> nn.Module:
        assert isinstance(self.attn, (FoldedAttention, FoldedSoftmaxAttention))
        twin = Block.__new__(Block)
        nn.Module.__init__(twin)
        twin.norm1, twin.attn = without_affine(self.norm1), self.attn.after(layernorm_affine(self.norm1))
        twin.norm2, twin.mlp = without_affine(self.norm2), self.mlp.after(layernorm_affine(self.norm2))
        return twin


class CastlingDeiT(nn.Module):
    """Castling-DeiT, plain or distilled. Shape: (B, C, H, W) -> logits (B, classes); the pair in distilled training."""

    fold_rule: ClassVar[str] = "heads merged; patch bias, class token and position in one constant"

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(config.channels, width, config.patch, stride=config.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if config.distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.prefix + math.prod(config.grid), width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.classes)
        self.head_dist = nn.Linear(width, config.classes) if config.distilled else None
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # (B, N, C)
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.head_dist is None:
            return self.head(x[:, 0])
        pair = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return pair if self.training else (pair[0] + pair[1]) / 2

    def folded(self) -> nn.Module:
        heads = [
            affine_before(head, layernorm_affine(self.norm)) for head in (self.head, self.head_dist) if head is not None
        ]
        patch = self.patch_embed["proj"]
        assert isinstance(patch, nn.Conv2d)
        if patch.bias is None:
            raise FoldError("the patch embedding has no bias", hint="load the network with its own class")
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        constant = torch.cat([*prefix, patch.bias.expand(1, self.pos_embed.shape[1] - len(prefix), -1)], dim=1)
        return FoldedDeiT(
            patch, constant + self.pos_embed, self.blocks, without_affine(self.norm), mean_of_each(heads), self.config
        )


class FoldedDeiT(nn.Module):
    """Castling-DeiT as it is exported. Shape: (B, C, H, W) -> logits (B, classes).

    `constant` (1, N, C) holds the prefix tokens, the position embedding and the patch bias; only the prefix tokens
    reach the last norm and the one head (rules 6, 7 and 23 of docs/folds.md).
    """

    def __init__(
        self,
        patch: nn.Conv2d,
        constant: torch.Tensor,
        blocks: nn.Module,
        norm: nn.LayerNorm,
        head: nn.Linear,
        config: DeiTConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Conv2d(
            patch.in_channels, patch.out_channels, config.patch, stride=config.patch, bias=False, device="meta"
        )
        self.patch.weight = patch.weight
        self.constant = nn.Buffer(constant)
        self.blocks, self.norm, self.head = blocks, norm, head

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, patches, C)
        x = nn.functional.pad(x, (0, 0, self.config.prefix, 0)) + self.constant
        for block in self.blocks:  # type: ignore[attr-defined]  # a ModuleList
            x = block(x)
        return self.head(self.norm(x[:, : self.config.prefix]).flatten(1))
