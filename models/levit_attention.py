"""LeViT's two kinds of attention (facebookresearch/LeViT levit.py) with linear-angular similarity.

The attention biases of a block enter the logits of the auxiliary branch only, so the cast drops them. How Castling
treats LeViT's downsampling attention is not published: here it keeps its softmax, because the identity and the token
convolution of linear-angular attention are defined for as many queries as keys. As an option (`down="linear"`) both
are taken at the queries.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from castling_deploy.castle import CastEvidence
from castling_deploy.fold import rows, scaled
from castling_deploy.models.attention import (
    FoldedAttention,
    FoldedSoftmaxAttention,
    Logits,
    attend,
    branch_evidence,
    cast_before_fold,
    join_heads,
    scaled_products,
    split_heads,
    token_conv,
)
from castling_deploy.models.family import (
    Size,
)
from castling_deploy.models.layers import LinearNorm
from castling_deploy.models.levit_config import LeViTConfig
from castling_deploy.rewrite import copied


def offset_index(grid: Size, stride: int = 1) -> torch.Tensor:
    """(queries, keys) index into a table of grid[0] * grid[1] biases: |dy| * width + |dx|, queries at [::stride]."""
    ys, xs = torch.arange(grid[0]), torch.arange(grid[1])
    dy = (ys[::stride, None] - ys[None]).abs()  # (h_q, h)
    dx = (xs[::stride, None] - xs[None]).abs()  # (w_q, w)
    index = dy[:, None, :, None] * grid[1] + dx[None, :, None, :]  # (h_q, w_q, h, w)
    return index.flatten(2).flatten(0, 1)


class EverySecond(nn.Module):
    """Tokens at [::2, ::2] of the grid: (..., h * w, C) -> (..., ceil(h / 2) * ceil(w / 2), C)."""

    def __init__(self, grid: Size) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-2, self.grid)[..., ::2, ::2, :].flatten(-3, -2)


def fold_rule_of(attention: Attention | AttentionDownsample) -> str:
    """The two kinds of attention fold differently."""
    softmax = "softmax scale into the queries; bias table gathered once"
    return softmax if attention.dconv is None else "attention constants"


def biased_logits(attention: Attention | AttentionDownsample, q: torch.Tensor, k: torch.Tensor) -> Logits:
    """LeViT's logits, with a bias for every offset in the grid; q (B, H, N', D), k (B, H, N, D)."""
    biases, index = attention.attention_biases, attention.index
    assert biases is not None and index is not None
    return lambda rows: scaled_products(q[:, :, rows], k) + biases[:, index[rows]]


def folded_form(
    attention: Attention | AttentionDownsample,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    asking: nn.Module | None = None,
) -> nn.Module:
    """The attention as it is exported, of either kind."""
    heads, output = attention.heads, attention.proj
    if attention.dconv is not None:
        return FoldedAttention(
            query, key, value, attention.dconv, output, heads=heads, tokens=attention.tokens, asking=asking
        )
    assert attention.attention_biases is not None
    bias = attention.attention_biases[:, attention.index]  # (H, N', N)
    query = scaled(query, attention.key_dim**-0.5)
    return FoldedSoftmaxAttention(query, key, value, output, heads=heads, bias=bias, asking=asking)


class Attention(nn.Module):
    """LeViT's attention with linear-angular similarity, Hardswish before the projection; softmax in the baseline.

    Values are wider than keys (2 D against D). The rows of `qkv` are, per head, [q D | k D | v 2 D].
    Shape: (B, N, C) -> (B, N, C).
    """

    fold_rule = property(fold_rule_of)
    logits = biased_logits

    def __init__(self, width: int, heads: int, config: LeViTConfig, grid: Size) -> None:
        super().__init__()
        angular = config.attention == "castling"
        self.heads, self.key_dim, self.tokens = heads, config.key_dim, math.prod(grid)
        self.aux_threshold = config.aux_threshold if angular else None
        self.qkv: nn.Module = LinearNorm(width, heads * 4 * config.key_dim)
        self.proj = nn.Sequential(
            OrderedDict(act=nn.Hardswish(), ln=LinearNorm(heads * 2 * config.key_dim, width, gamma=0))
        )
        self.dconv = token_conv(heads, config.kernel) if angular else None
        self.attention_biases: nn.Parameter | None = nn.Parameter(torch.zeros(heads, self.tokens))
        self.index: torch.Tensor | None = nn.Buffer(offset_index(grid), persistent=False)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, N, C) -> q, k (B, H, N, D), v (B, H, N, 2 D)."""
        q, k, v = split_heads(self.qkv(x), self.heads).split([self.key_dim, self.key_dim, 2 * self.key_dim], dim=-1)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(join_heads(attend(self, *self.split(x))))

    def cast_evidence(self, x: torch.Tensor) -> CastEvidence | None:
        return branch_evidence(self, *self.split(x))

    def castled(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, Attention)
        if twin.dconv is not None:
            twin.aux_threshold = twin.attention_biases = twin.index = None
        return twin

    def folded(self) -> nn.Module:
        cast_before_fold(self)
        assert isinstance(self.qkv, nn.Linear)
        index = torch.arange(self.qkv.out_features).view(self.heads, -1)  # (H, 4 D)
        q, k, v = index.split([self.key_dim, self.key_dim, 2 * self.key_dim], dim=1)
        query, key, value = (rows(self.qkv, part.flatten()) for part in (q, k, v))
        return folded_form(self, query, key, value)


class AttentionDownsample(nn.Module):
    """LeViT's downsampling: only every second token of every second row asks.

    Softmax attention as in LeViT, or (`down="linear"`) linear-angular attention: the identity and the token
    convolution are then taken at the tokens that ask, and the attention biases belong to the auxiliary branch.
    The rows of `kv` are, per head, [k D | v 4 D]. Shape: (B, N, C_in) -> (B, ceil(h / 2) * ceil(w / 2), C_out).
    """

    fold_rule = property(fold_rule_of)
    logits = biased_logits

    def __init__(self, width_in: int, width_out: int, config: LeViTConfig, grid: Size) -> None:
        super().__init__()
        key_dim, angular = config.key_dim, config.down == "linear"
        heads = width_in // key_dim
        self.heads, self.key_dim, self.tokens = heads, key_dim, math.prod(grid)
        self.kv = LinearNorm(width_in, heads * 5 * key_dim)
        self.asking = EverySecond(grid)
        self.q = nn.Sequential(OrderedDict(ln=LinearNorm(width_in, heads * key_dim)))
        self.proj = nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=LinearNorm(heads * 4 * key_dim, width_out)))
        self.dconv = token_conv(heads, config.kernel) if angular else None
        self.aux_threshold = config.aux_threshold if angular else None
        self.attention_biases: nn.Parameter | None = nn.Parameter(torch.zeros(heads, self.tokens))
        self.index: torch.Tensor | None = nn.Buffer(offset_index(grid, stride=2), persistent=False)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, N, C_in) -> q (B, H, N', D), k (B, H, N, D), v (B, H, N, 4 D)."""
        k, v = split_heads(self.kv(x), self.heads).split([self.key_dim, 4 * self.key_dim], dim=-1)
        return split_heads(self.q(self.asking(x)), self.heads), k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(join_heads(attend(self, *self.split(x), self.asking)))

    def cast_evidence(self, x: torch.Tensor) -> CastEvidence | None:
        return branch_evidence(self, *self.split(x), self.asking)

    def castled(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, AttentionDownsample)
        if twin.dconv is not None:
            twin.aux_threshold = twin.attention_biases = twin.index = None
        return twin

    def folded(self) -> nn.Module:
        cast_before_fold(self)
        query, kv = self.q.ln, self.kv
        assert isinstance(query, nn.Linear) and isinstance(kv, nn.Linear)
        index = torch.arange(kv.out_features).view(self.heads, -1)  # (H, 5 D)
        key = rows(kv, index[:, : self.key_dim].flatten())
        value = rows(kv, index[:, self.key_dim :].flatten())
        return folded_form(self, query, key, value, self.asking)
