"""Castling-DeiT: DeiT (Touvron et al., ICML 2021; facebookresearch/deit models.py) with linear-angular attention.

Plain and distilled. State-dict names are those of facebook's and timm's DeiT; the attention adds `attn.dconv.weight`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.errors import FoldError
from castling_deploy.fold import ZeroMeanNorm, affine_before, centred, layernorm_affine, mean_of_each, without_affine
from castling_deploy.models.attention import (
    FirstTokens,
    FoldedAttention,
    FoldedSoftmaxAttention,
    LinearAngularAttention,
    SoftmaxAttention,
)
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.layers import Mlp
from castling_deploy.rewrite import copied


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
        return FoldedBlock(
            without_affine(self.norm1),
            self.attn.after(layernorm_affine(self.norm1)),
            without_affine(self.norm2),
            self.mlp.after(layernorm_affine(self.norm2)),
        )


class FoldedBlock(nn.Module):
    """Block as it is exported; only the tokens of `asking`, all of them by default, leave it (rule 30).

    Shape: (B, N, C) -> (B, N', C).
    """

    def __init__(
        self,
        norm1: nn.LayerNorm,
        attn: FoldedAttention | FoldedSoftmaxAttention,
        norm2: nn.LayerNorm,
        mlp: Mlp,
        asking: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.asking = asking or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.asking(x) + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def centred(self) -> FoldedBlock:
        """The block of a stream without mean: neither of the two Linears that write into it adds one (rule 31)."""
        twin = copied(self)
        assert isinstance(twin, FoldedBlock) and isinstance(self.attn.output, nn.Linear)
        twin.norm1, twin.norm2 = ZeroMeanNorm(self.norm1), ZeroMeanNorm(self.norm2)
        twin.attn.output, twin.mlp.fc2 = centred(self.attn.output), centred(self.mlp.fc2)
        return twin

    def asked_by(self, asking: nn.Module) -> FoldedBlock:
        """The block that is computed for the tokens of `asking` alone."""
        return FoldedBlock(self.norm1, self.attn.asked_by(asking), self.norm2, self.mlp, asking)


def patch_embedding(config: DeiTConfig) -> nn.ModuleDict:
    """Patches that do not overlap: (B, channels, H, W) -> (B, width, *grid)."""
    return nn.ModuleDict({"proj": nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)})


def learned(*shape: int) -> nn.Parameter:
    """A token or position embedding with fresh values."""
    parameter = nn.Parameter(torch.zeros(*shape))
    nn.init.trunc_normal_(parameter, std=0.02)
    return parameter


def blocks(config: DeiTConfig) -> nn.ModuleList:
    """All blocks, with fresh weights."""
    made = nn.ModuleList(Block(config) for _ in range(config.depth))
    initialise(made)
    return made


def initialise(network: nn.Module) -> None:
    """Fresh weights of every Linear, in place."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def prefix_of(network: CastlingDeiT | DeiTBackbone) -> list[nn.Parameter]:
    """The tokens in front of the patches, each (1, 1, C)."""
    return [network.cls_token] if network.dist_token is None else [network.cls_token, network.dist_token]


def embedded(network: CastlingDeiT | DeiTBackbone, image: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, width): prefix tokens and patches, positions added."""
    x = network.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # (B, patches, width)
    prefix = (token.expand(len(x), -1, -1) for token in prefix_of(network))
    return torch.cat([*prefix, x], dim=1) + network.pos_embed


class FoldedEmbedding(nn.Module):
    """`embedded` as it is exported: (B, C, H, W) -> (B, N, width).

    `constant` (1, N, width) holds the prefix tokens, the position embedding and the patch bias (rule 23).
    """

    def __init__(self, network: CastlingDeiT | DeiTBackbone) -> None:
        super().__init__()
        patch, prefix = network.patch_embed["proj"], prefix_of(network)
        assert isinstance(patch, nn.Conv2d)
        if patch.bias is None:
            raise FoldError("the patch embedding has no bias", hint="load the network with its own class")
        self.prefix, side = len(prefix), network.config.patch
        self.patch = nn.Conv2d(patch.in_channels, patch.out_channels, side, stride=side, bias=False, device="meta")
        self.patch.weight = patch.weight
        patches = patch.bias.expand(1, network.pos_embed.shape[1] - self.prefix, -1)
        self.constant = nn.Buffer(torch.cat([*prefix, patches], dim=1) + network.pos_embed)

    def centred(self) -> FoldedEmbedding:
        """The embedding of a stream without mean (rule 31)."""
        twin, constant = copied(self), self.constant.double()
        assert isinstance(twin, FoldedEmbedding)
        twin.patch = centred(self.patch)
        twin.constant = nn.Buffer((constant - constant.mean(-1, keepdim=True)).to(self.constant.dtype))
        return twin

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, patches, width)
        return nn.functional.pad(x, (0, 0, self.prefix, 0)) + self.constant


class CastlingDeiT(nn.Module):
    """Castling-DeiT, plain or distilled. Shape: (B, C, H, W) -> logits (B, classes); the pair in distilled training."""

    fold_rule: ClassVar[str] = (
        "heads merged; last block for the class token; patch bias, class token, position in one constant; "
        "mean taken out of the tokens"
    )

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = patch_embedding(config)
        self.cls_token = learned(1, 1, width)
        self.dist_token = learned(1, 1, width) if config.distilled else None
        self.pos_embed = learned(1, config.prefix + math.prod(config.grid), width)
        self.blocks = blocks(config)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.classes)
        self.head_dist = nn.Linear(width, config.classes) if config.distilled else None
        for head in (self.head, self.head_dist):
            if head is not None:
                initialise(head)

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = embedded(self, image)
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
        *blocks, last = (block.centred() for block in self.blocks)  # type: ignore[operator]  # FoldedBlock's
        blocks.append(last.asked_by(FirstTokens(self.config.prefix)))
        embedding = FoldedEmbedding(self).centred()
        return FoldedDeiT(embedding, nn.ModuleList(blocks), ZeroMeanNorm(self.norm), mean_of_each(heads))


class FoldedDeiT(nn.Module):
    """Castling-DeiT as it is exported. Shape: (B, C, H, W) -> logits (B, classes).

    Only the prefix tokens leave the last block, for the last norm and the one head (rules 6, 7, 30 of docs/folds.md).
    """

    def __init__(self, embedding: FoldedEmbedding, blocks: nn.Module, norm: nn.LayerNorm, head: nn.Linear) -> None:
        super().__init__()
        self.embedding, self.blocks, self.norm, self.head = embedding, blocks, norm, head

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embedding(image)
        for block in self.blocks:  # type: ignore[attr-defined]  # a ModuleList
            x = block(x)
        return self.head(self.norm(x).flatten(1))


SEEN = 4  # maps that a decoder is given, after blocks spread evenly: 3, 6, 9, 12 of 12 (mmsegmentation upernet_vit)


class DeiTBackbone(nn.Module):
    """Castling-DeiT without its last norm and its head: (B, C, H, W) -> four maps, all of the patches' stride."""

    fold_rule: ClassVar[str] = "patch bias, class token and position in one constant"

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = patch_embedding(config)
        self.cls_token = learned(1, 1, config.width)
        self.dist_token = learned(1, 1, config.width) if config.distilled else None
        self.pos_embed = learned(1, config.prefix + math.prod(config.grid), config.width)
        self.blocks = blocks(config)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return seen(embedded(self, image), self.blocks, self.config)

    def folded(self) -> nn.Module:
        return FoldedDeiTBackbone(FoldedEmbedding(self), self.blocks, self.config)


class FoldedDeiTBackbone(nn.Module):
    """DeiTBackbone as it is exported. Shape: (B, C, H, W) -> four maps (B, width, *grid)."""

    def __init__(self, embedding: FoldedEmbedding, blocks: nn.ModuleList, config: DeiTConfig) -> None:
        super().__init__()
        self.embedding, self.blocks, self.config = embedding, blocks, config

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return seen(self.embedding(image), self.blocks, self.config)


def seen(x: torch.Tensor, blocks: nn.ModuleList, config: DeiTConfig) -> tuple[torch.Tensor, ...]:
    """Tokens (B, N, width) -> the patches after each quarter of the blocks, as SEEN maps (B, width, *grid)."""
    maps = []
    last = [config.depth * quarter // SEEN - 1 for quarter in range(1, SEEN + 1)]
    for number, block in enumerate(blocks):
        x = block(x)
        maps += last.count(number) * [x[:, config.prefix :].transpose(1, 2).unflatten(2, config.grid)]
    return tuple(maps)
