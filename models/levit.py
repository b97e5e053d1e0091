"""Castling-LeViT: LeViT (Graham et al., ICCV 2021; facebookresearch/LeViT levit.py) with linear-angular attention.

State-dict names are those of timm's LeViT; the attention adds `attn.dconv.weight`. The attention biases of a block
enter the logits of the auxiliary branch only, so the cast drops them. How Castling treats LeViT's downsampling
attention is not published: here it keeps its softmax, because the identity and the token convolution of linear-angular
attention are defined for as many queries as keys. As an option (`down="linear"`) both are taken at the queries.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from castling_deploy.castle import CastEvidence
from castling_deploy.errors import ShapeError
from castling_deploy.fold import mean_of, rows, scaled
from castling_deploy.models.attention import (
    FoldedAttention,
    FoldedSoftmaxAttention,
    attend,
    branch_evidence,
    cast_before_fold,
    join_heads,
    scaled_products,
    split_heads,
    token_conv,
)
from castling_deploy.models.family import (
    OFFICIAL_THRESHOLD,
    AttentionKind,
    Output,
    Size,
    Tensors,
    attention_of,
    count,
    interpolated,
    logits,
    native_size,
    tensor,
    with_baselines,
)
from castling_deploy.models.layers import ConvNorm, LinearNorm, NormLinear
from castling_deploy.rewrite import copied

STEM_STRIDE = 16  # four convolutions of stride 2


@dataclass(frozen=True)
class LeViTConfig:
    """Hyper-parameters; the defaults are Castling-LeViT-128S's.

    One entry per stage in `widths` (C), `heads` and `depths`; `key_dim` is D, values have 2 D channels per head (4 D
    in the downsampling attention, which has C_in / D heads). `down` is the kind of that attention.
    """

    widths: tuple[int, ...] = (128, 256, 384)
    heads: tuple[int, ...] = (4, 6, 8)
    depths: tuple[int, ...] = (2, 3, 4)
    key_dim: int = 16
    distilled: bool = True
    image_size: Size = (224, 224)
    channels: int = 3
    classes: int = 1000
    kernel: int = 9
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "castling"
    down: Literal["softmax", "linear"] = "softmax"

    @property
    def grids(self) -> tuple[Size, ...]:
        """Tokens along height and width, per stage: 14 x 14, 7 x 7, 4 x 4 at 224 pixels."""
        grid = (math.ceil(self.image_size[0] / STEM_STRIDE), math.ceil(self.image_size[1] / STEM_STRIDE))
        grids = [grid]
        for _ in self.widths[1:]:
            grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            grids.append(grid)
        return tuple(grids)

    def __post_init__(self) -> None:
        if min(self.image_size) < STEM_STRIDE:
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels is smaller than one token of Castling-LeViT",
                hint=f"use at least {STEM_STRIDE} pixels for --imgsz",
            )
        if any(width % self.key_dim for width in self.widths[:-1]):
            raise ShapeError(
                f"widths {self.widths} are no multiples of the key dimension {self.key_dim}",
                hint="the downsampling attention has width / key_dim heads",
            )


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


def biased_logits(attention: Attention | AttentionDownsample, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """LeViT's logits, with a bias for every offset in the grid: (B, H, N', D), (B, H, N, D) -> (B, H, N', N)."""
    assert attention.attention_biases is not None and attention.index is not None
    return scaled_products(q, k) + attention.attention_biases[:, attention.index]


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


VARIANTS: Mapping[str, LeViTConfig] = with_baselines(
    {
        "castling-levit-128s": LeViTConfig(),
        "castling-levit-128": LeViTConfig(heads=(4, 8, 12), depths=(4, 4, 4)),
        "castling-levit-192": LeViTConfig((192, 288, 384), (3, 5, 6), (4, 4, 4), 32),
        "castling-levit-256": LeViTConfig((256, 384, 512), (4, 6, 8), (4, 4, 4), 32),
        "castling-levit-384": LeViTConfig((384, 512, 768), (6, 9, 12), (4, 4, 4), 32),
    }
)


class LeViTFamily:
    """Recognises, builds and resizes Castling-LeViT."""

    name = "castling-levit"
    baseline = "levit"
    title = "Castling-LeViT"
    task = "classification"
    preprocessing: Mapping[str, Any] = {}
    reference = "arXiv:2211.10526; LeViT: arXiv:2104.01136"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return {"stem.conv1.linear.weight", "stages.0.blocks.0.attn.qkv.linear.weight"} <= tensors.keys()

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> LeViTConfig:
        stages = range(count(tensors, "stages."))
        biases = [tensor(tensors, f"stages.{stage}.blocks.0.attn.attention_biases") for stage in stages]  # (H, h * w)
        heads = tuple(table.shape[0] for table in biases)
        attention, kernel = attention_of(tensors), LeViTConfig.kernel
        if attention == "castling":
            kernel = tensor(tensors, "stages.0.blocks.0.attn.dconv.weight").shape[2]
        qkv = tensor(tensors, "stages.0.blocks.0.attn.qkv.linear.weight")  # (4 H D, C)
        return LeViTConfig(
            widths=tuple(
                tensor(tensors, f"stages.{stage}.blocks.0.attn.qkv.linear.weight").shape[1] for stage in stages
            ),
            heads=heads,
            depths=tuple(count(tensors, f"stages.{stage}.blocks.") for stage in stages),
            key_dim=qkv.shape[0] // (4 * heads[0]),
            distilled="head_dist.linear.weight" in tensors,
            image_size=native_size(biases[0].shape[1], STEM_STRIDE, image_size),
            channels=tensor(tensors, "stem.conv1.linear.weight").shape[1],
            classes=tensor(tensors, "head.linear.weight").shape[0],
            kernel=kernel,
            aux_threshold=aux_threshold,
            attention=attention,
            down="linear" if "stages.1.downsample.attn_downsample.dconv.weight" in tensors else "softmax",
        )

    def outputs(self, config: LeViTConfig) -> tuple[Output, ...]:
        return logits(config.classes)

    def build(self, config: LeViTConfig) -> nn.Module:
        return CastlingLeViT(config)

    def resized(self, tensors: Tensors, config: LeViTConfig, image_size: Size) -> tuple[Tensors, LeViTConfig]:
        new = replace(config, image_size=image_size)
        changed = {}
        for name, table in tensors.items():  # (H, h * w)
            if name.endswith(".attention_biases"):
                stage = int(name.split(".")[1]) - (".downsample." in name)
                grid = table.unflatten(1, config.grids[stage])[None]
                changed[name] = interpolated(grid, new.grids[stage])[0].flatten(1)
        return {**tensors, **changed}, new
