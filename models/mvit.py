"""Castling-MViTv2: MViTv2 (Li et al., CVPR 2022; facebookresearch/mvit) with linear-angular attention.

State-dict names are those of timm's MViTv2; the attention adds `attn.dconv.weight`. How Castling treats pooling
attention is not published. Here keys and values are pooled with the queries' stride, so that every query has its own
value for the identity and the token convolution (0.6 % more multiply-accumulates than the original strides), and the
pooled queries are added after both, as in the original. Relative positions enter the logits of the auxiliary branch
only, so the cast drops them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from castling_deploy.castle import CastEvidence
from castling_deploy.errors import ShapeError
from castling_deploy.fold import (
    Affine,
    affine_before,
    layernorm_affine,
    scaled,
    without_affine,
)
from castling_deploy.models.attention import (
    attend,
    branch_evidence,
    cast_before_fold,
    folded_attend,
    join_heads,
    scaled_products,
    split_heads,
    split_qkv,
    thirds,
    token_conv,
    value_scale,
)
from castling_deploy.models.family import (
    OFFICIAL_THRESHOLD,
    AttentionKind,
    Output,
    Size,
    Tensors,
    attention_of,
    count,
    logits,
    tensor,
    with_baselines,
)
from castling_deploy.models.layers import Mlp
from castling_deploy.rewrite import copied

PATCH_STRIDE = 4
EPS = 1e-6  # of every LayerNorm


@dataclass(frozen=True)
class MViTv2Config:
    """Hyper-parameters; the defaults are Castling-MViTv2-T's.

    One entry per stage in `widths` (C), `heads` and `depths`. The first block of every stage but the first halves
    height and width. `positions`: whether the softmax (of the auxiliary branch, or the baseline's) has relative ones.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    depths: tuple[int, ...] = (1, 2, 5, 2)
    mlp_ratio: int = 4
    positions: bool = True
    image_size: Size = (224, 224)
    channels: int = 3
    classes: int = 1000
    kernel: int = 9
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "castling"

    @property
    def grids(self) -> tuple[Size, ...]:
        """Tokens along height and width, per stage: 56 x 56 to 7 x 7 at 224 pixels."""
        height, width = self.image_size
        strides = [PATCH_STRIDE << stage for stage in range(len(self.widths))]
        return tuple((height // stride, width // stride) for stride in strides)

    def __post_init__(self) -> None:
        stride = PATCH_STRIDE << (len(self.widths) - 1)
        if any(side <= 0 or side % stride for side in self.image_size):
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels cannot be halved {len(self.widths) - 1} times after patches of "
                f"{PATCH_STRIDE}",
                hint=f"use multiples of {stride} for --imgsz",
            )
        if any(width % heads for width, heads in zip(self.widths, self.heads)):
            raise ShapeError(
                f"widths {self.widths} cannot be split over {self.heads} heads",
                hint="choose numbers of heads that divide the widths",
            )


@dataclass(frozen=True)
class Place:
    """Where an attention stands: its channels, the tokens it gets, the strides that pool its queries and its keys.

    Values are pooled as keys are. `table` is the finest grid of the original's queries and keys, which its relative
    positions are counted on.
    """

    width_in: int
    width: int
    heads: int
    grid: Size
    stride: int
    key_stride: int
    table: Size

    @property
    def queries(self) -> Size:
        """Along height and width."""
        return self.grid[0] // self.stride, self.grid[1] // self.stride

    @property
    def keys(self) -> Size:
        """Along height and width."""
        return self.grid[0] // self.key_stride, self.grid[1] // self.key_stride


def place_of(config: MViTv2Config, stage: int, block: int) -> Place:
    """The original pools keys by 4, 2, 1, 1 in its stages, whatever the queries' stride; Castling as the queries."""
    enters = stage > 0 and block == 0
    before = stage - 1 if enters else stage
    grid, stride = config.grids[before], 2 if enters else 1
    original = max(4 >> stage, 1)
    finest = min(stride, original)
    key_stride = original if config.attention == "softmax" else stride
    table = grid[0] // finest, grid[1] // finest
    return Place(config.widths[before], config.widths[stage], config.heads[stage], grid, stride, key_stride, table)


def distance_index(queries: int, keys: int, table: int) -> torch.Tensor:
    """(queries, keys) index into a table of 2 * table - 1 relative positions along one axis.

    Of facebookresearch/mvit's cal_rel_pos_spatial, with the distances counted on any grid that both are subsets of.
    """
    query = torch.arange(queries) * (table // queries)
    key = torch.arange(keys) * (table // keys)
    return query[:, None] - key[None] + (keys - 1) * (table // keys)


def as_map(x: torch.Tensor, grid: Size) -> torch.Tensor:
    """(B, h * w, C) -> (B, C, h, w)."""
    return x.transpose(1, 2).unflatten(2, grid)


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def head_conv(head_dim: int, stride: int) -> nn.Conv2d:
    """MViTv2's pooling: a depthwise 3 x 3 convolution of the token grid, one kernel per channel of a head."""
    return nn.Conv2d(head_dim, head_dim, 3, stride, 1, groups=head_dim, bias=False)


class PoolingAttention(nn.Module):
    """MViTv2's attention with linear-angular similarity (softmax in the baseline), the pooled queries added.

    Queries, keys and values are pooled by a convolution that all heads share, then normalised.
    Shape: (B, h * w, C_in) -> (B, h' * w', C).
    """

    def __init__(self, place: Place, config: MViTv2Config) -> None:
        super().__init__()
        head_dim, angular = place.width // place.heads, config.attention == "castling"
        self.place = place
        self.aux_threshold = config.aux_threshold if angular else None
        self.qkv = nn.Linear(place.width_in, 3 * place.width)
        self.proj = nn.Linear(place.width, place.width)
        self.pool_q, self.norm_q = head_conv(head_dim, place.stride), nn.LayerNorm(head_dim, EPS)
        self.pool_k, self.norm_k = head_conv(head_dim, place.key_stride), nn.LayerNorm(head_dim, EPS)
        self.pool_v, self.norm_v = head_conv(head_dim, place.key_stride), nn.LayerNorm(head_dim, EPS)
        self.dconv = token_conv(place.heads, config.kernel) if angular else None
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if config.positions:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * place.table[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * place.table[1] - 1, head_dim))

    @property
    def fold_rule(self) -> str:
        return "softmax scale into the keys; positions gathered once" if self.dconv is None else "attention constants"

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, N, C_in) -> q (B, H, N', D), k and v (B, H, N'', D), pooled and normalised; N' = N'' in Castling."""
        q, k, v = split_qkv(self.qkv(x), self.place.heads)
        return (
            self.norm_q(self._pooled(q, self.pool_q)),
            self.norm_k(self._pooled(k, self.pool_k)),
            self.norm_v(self._pooled(v, self.pool_v)),
        )

    def _pooled(self, x: torch.Tensor, pool: nn.Conv2d) -> torch.Tensor:
        """(B, H, N, D) -> (B, H, N', D)."""
        return as_tokens(pool(as_map(x.flatten(0, 1), self.place.grid))).unflatten(0, (-1, self.place.heads))

    def logits(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Those of the softmax (B, H, N', N''), with the relative positions."""
        logits = scaled_products(q, k)
        positions = self.positions()
        return logits if positions is None else logits + positional_logits(q, *positions)

    def positions(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Relative positions of every query and key along an axis: (h', h'', D) and (w', w'', D); None without."""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return None
        (height, width), (key_height, key_width), table = self.place.queries, self.place.keys, self.place.table
        down = self.rel_pos_h[distance_index(height, key_height, table[0])]
        return down, self.rel_pos_w[distance_index(width, key_width, table[1])]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        return self.proj(join_heads(attend(self, q, k, v) + q))

    def cast_evidence(self, x: torch.Tensor) -> CastEvidence | None:
        return branch_evidence(self, *self.split(x))

    def castled(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, PoolingAttention)
        if twin.dconv is not None:
            twin.aux_threshold = twin.rel_pos_h = twin.rel_pos_w = None
        return twin

    def folded(self) -> nn.Module:
        cast_before_fold(self)
        query, key, value = thirds(self.qkv)
        heads, grid = self.place.heads, self.place.grid
        queries = Pooled(query, widened(self.pool_q, heads), self.norm_q, heads, grid)
        if self.dconv is None:
            norm = norm_times(self.norm_k, self.norm_k.normalized_shape[0] ** -0.5)
            keys = Pooled(key, widened(self.pool_k, heads), norm, heads, grid)
            values = Pooled(value, widened(self.pool_v, heads), self.norm_v, heads, grid)
            return FoldedPoolingSoftmax(queries, keys, values, self.proj, self.positions())
        factor = pooled_value_scale(math.prod(self.place.keys), self.norm_v)
        keys = Pooled(key, widened(self.pool_k, heads), self.norm_k, heads, grid)
        values = Pooled(value, widened(self.pool_v, heads), norm_times(self.norm_v, factor), heads, grid)
        return FoldedPoolingAttention(queries, keys, values, self.proj, scaled(self.dconv, 1 / factor))


def positional_logits(q: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """q . R_h + q . R_w (MViTv2, equation 4).

    Shape: q (B, H, h' * w', D), down (h', h, D), across (w', w, D) -> (B, H, h' * w', h * w).
    """
    q = q.unflatten(2, (down.shape[0], across.shape[0]))  # (B, H, h', w', D)
    vertical = (q @ down.transpose(1, 2)).flatten(2, 3)  # (B, H, h' * w', h)
    horizontal = (q.transpose(2, 3) @ across.transpose(1, 2)).transpose(2, 3).flatten(2, 3)  # (B, H, h' * w', w)
    return (vertical[..., :, None] + horizontal[..., None, :]).flatten(3)


def widened(conv: nn.Conv2d, heads: int) -> nn.Conv2d:
    """The convolution that all heads share, as one over the channels of all heads side by side."""
    twin = nn.Conv2d(
        heads * conv.in_channels, heads * conv.out_channels, 3, groups=heads * conv.groups, bias=False, device="meta"
    )
    twin.stride, twin.padding = conv.stride, conv.padding
    twin.weight = nn.Parameter(conv.weight.repeat(heads, 1, 1, 1), requires_grad=False)
    return twin.eval()


def pooled_value_scale(tokens: int, norm: nn.LayerNorm) -> float:
    """`value_scale`, or less where float16 needs it: pooled values are normalised, so the worst case is known.

    ||v|| is at most sqrt(D) max|gamma| + ||beta|| = V, and ||u + q^ (2 / pi) k^^T u|| at most c V (1 + 2 N / pi), whose
    square must stay below 65504. At 3136 tokens and V = sqrt(96) that makes 1/128 of 1/64.
    """
    largest = norm.normalized_shape[0] ** 0.5 * norm.weight.abs().max().item() + norm.bias.norm().item()
    safe = 65504**0.5 / (largest * (1 + 2 * tokens / math.pi)) if largest else 1.0
    return min(value_scale(tokens), 2.0 ** math.floor(math.log2(safe)))


def norm_times(norm: nn.LayerNorm, factor: float) -> nn.LayerNorm:
    """norm, then a constant factor, as one LayerNorm."""
    twin = nn.LayerNorm(norm.normalized_shape, norm.eps).eval()
    twin.weight = nn.Parameter(norm.weight * factor, requires_grad=False)
    twin.bias = nn.Parameter(norm.bias * factor, requires_grad=False)
    return twin


class Pooled(nn.Module):
    """Linear, pooling and norm of one of q, k, v, as exported. Shape: (B, h * w, C_in) -> (B, H, h' * w', D).

    The norm keeps its affine part: what follows normalises over the same channels or adds to them (rule 8).
    """

    def __init__(self, linear: nn.Linear, pool: nn.Conv2d, norm: nn.LayerNorm, heads: int, grid: Size) -> None:
        super().__init__()
        self.linear, self.pool, self.norm, self.heads, self.grid = linear, pool, norm, heads, grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = as_tokens(self.pool(as_map(self.linear(x), self.grid)))  # (B, N', C)
        return self.norm(split_heads(pooled, self.heads))

    def after(self, affine: Affine) -> Pooled:
        """What takes an input that was scaled and shifted per channel before (rule 7)."""
        return Pooled(affine_before(self.linear, affine), self.pool, self.norm, self.heads, self.grid)


class FoldedPoolingAttention(nn.Module):
    """PoolingAttention as it is exported, `dconv` and the values' norm scaled: (B, N, C_in) -> (B, N', C)."""

    def __init__(self, query: Pooled, key: Pooled, value: Pooled, output: nn.Module, dconv: nn.Conv2d) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output, self.dconv = query, key, value, output, dconv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x)
        return self.output(join_heads(folded_attend(q, self.key(x), self.value(x), self.dconv) + q))

    def after(self, affine: Affine) -> FoldedPoolingAttention:
        """The attention whose input was scaled and shifted per channel before (rule 7)."""
        query, key, value = (part.after(affine) for part in (self.query, self.key, self.value))
        return FoldedPoolingAttention(query, key, value, self.output, self.dconv)


class FoldedPoolingSoftmax(nn.Module):
    """The softmax baseline's attention as it is exported, the keys' norm scaled: (B, N, C_in) -> (B, N', C)."""

    def __init__(
        self,
        query: Pooled,
        key: Pooled,
        value: Pooled,
        output: nn.Module,
        positions: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = query, key, value, output
        self.down = None if positions is None else nn.Buffer(positions[0])
        self.across = None if positions is None else nn.Buffer(positions[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x)
        logits = q @ self.key(x).transpose(-2, -1)  # (B, H, N', N'')
        if self.down is not None and self.across is not None:
            logits = logits + positional_logits(q, self.down, self.across)
        return self.output(join_heads(logits.softmax(-1) @ self.value(x) + q))

    def after(self, affine: Affine) -> FoldedPoolingSoftmax:
        """The attention whose input was scaled and shifted per channel before (rule 7)."""
        query, key, value = (part.after(affine) for part in (self.query, self.key, self.value))
        positions = None if self.down is None or self.across is None else (self.down, self.across)
        return FoldedPoolingSoftmax(query, key, value, self.output, positions)


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


class CastlingMViTv2(nn.Module):
    """Castling-MViTv2 without a class token. Shape: (B, C, H, W) -> logits (B, classes)."""

    fold_rule: ClassVar[str] = "LayerNorm affine through the token mean"

    def __init__(self, config: MViTv2Config) -> None:
        super().__init__()
        self.config = config
        patch = nn.Conv2d(config.channels, config.widths[0], 7, PATCH_STRIDE, 3)
        self.patch_embed = nn.ModuleDict({"proj": patch})
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.widths)))
        self.norm = nn.LayerNorm(config.widths[-1], EPS)
        self.head = nn.ModuleDict({"fc": nn.Linear(config.widths[-1], config.classes)})
        for name, parameter in self.named_parameters():
            if name.endswith((".rel_pos_h", ".rel_pos_w")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

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


VARIANTS: Mapping[str, MViTv2Config] = with_baselines(
    {
        "castling-mvitv2-tiny": MViTv2Config(),
        "castling-mvitv2-small": MViTv2Config(depths=(1, 2, 11, 2)),
        "castling-mvitv2-base": MViTv2Config(depths=(2, 3, 16, 3)),
    }
)


class MViTv2Family:
    """Recognises, builds and resizes Castling-MViTv2."""

    name = "castling-mvitv2"
    baseline = "mvitv2"
    title = "Castling-MViTv2"
    task = "classification"
    preprocessing: Mapping[str, Any] = {}
    reference = "arXiv:2211.10526; MViTv2: arXiv:2112.01526"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return {"patch_embed.proj.weight", "stages.0.blocks.0.attn.pool_q.weight"} <= tensors.keys()

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> MViTv2Config:
        stages = range(count(tensors, "stages."))
        head_dim = tensor(tensors, "stages.0.blocks.0.attn.pool_q.weight").shape[0]
        widths = tuple(tensor(tensors, f"stages.{stage}.blocks.0.attn.proj.weight").shape[0] for stage in stages)
        attention, kernel = attention_of(tensors), MViTv2Config.kernel
        if attention == "castling":
            kernel = tensor(tensors, "stages.0.blocks.0.attn.dconv.weight").shape[2]
        positions = "stages.0.blocks.0.attn.rel_pos_h" in tensors
        if positions:  # 2 n - 1 relative positions for n tokens along an axis
            sides = (tensor(tensors, f"stages.0.blocks.0.attn.rel_pos_{axis}").shape[0] for axis in "hw")
            height, width = (PATCH_STRIDE * (side + 1) // 2 for side in sides)
            image_size = height, width
        return MViTv2Config(
            widths=widths,
            heads=tuple(width // head_dim for width in widths),
            depths=tuple(count(tensors, f"stages.{stage}.blocks.") for stage in stages),
            mlp_ratio=tensor(tensors, "stages.0.blocks.0.mlp.fc1.weight").shape[0] // widths[0],
            positions=positions,
            image_size=image_size or MViTv2Config.image_size,
            channels=tensor(tensors, "patch_embed.proj.weight").shape[1],
            classes=tensor(tensors, "head.fc.weight").shape[0],
            kernel=kernel,
            aux_threshold=aux_threshold,
            attention=attention,
        )

    def outputs(self, config: MViTv2Config) -> tuple[Output, ...]:
        return logits(config.classes)

    def build(self, config: MViTv2Config) -> nn.Module:
        return CastlingMViTv2(config)

    def resized(self, tensors: Tensors, config: MViTv2Config, image_size: Size) -> tuple[Tensors, MViTv2Config]:
        new = replace(config, image_size=image_size)
        changed = {}
        for name, table in tensors.items():  # (2 n - 1, D)
            if name.endswith((".rel_pos_h", ".rel_pos_w")):
                _, stage, _, block, *_ = name.split(".")
                side = place_of(new, int(stage), int(block)).table[name.endswith("w")]
                changed[name] = stretched(table, 2 * side - 1)
        return {**tensors, **changed}, new


def stretched(table: torch.Tensor, length: int) -> torch.Tensor:
    """(L, D) -> (length, D): linear interpolation, as facebookresearch/mvit's get_rel_pos."""
    return nn.functional.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T
