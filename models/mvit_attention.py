"""MViTv2's pooling attention (facebookresearch/mvit attention.py) with linear-angular similarity.

How Castling treats pooling attention is not published. Here keys and values are pooled with the queries' stride, so
that every query has its own value for the identity and the token convolution (0.6 % more multiply-accumulates than the
original strides), and the pooled queries are added after both, as in the original. Relative positions enter the logits
of the auxiliary branch only, so the cast drops them.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from castling_deploy.castle import CastEvidence
from castling_deploy.fold import (
    Affine,
    affine_before,
    scaled,
)
from castling_deploy.models.attention import (
    Logits,
    attend,
    branch_evidence,
    cast_before_fold,
    folded_attend,
    heads_of,
    join_heads,
    scaled_products,
    split_qkv,
    thirds,
    token_conv,
    value_scale,
)
from castling_deploy.models.family import (
    Size,
)
from castling_deploy.models.mvit_config import EPS, MViTv2Config, Place
from castling_deploy.rewrite import copied


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

    def logits(self, q: torch.Tensor, k: torch.Tensor) -> Logits:
        """Those of the softmax, with the relative positions; q (B, H, N', D), k (B, H, N'', D)."""
        positions = self.positions()
        if positions is None:
            return lambda rows: scaled_products(q[:, :, rows], k)
        down, across = along_axes(q, *positions)
        return lambda rows: scaled_products(q[:, :, rows], k) + of_pairs(down[:, :, rows], across[:, :, rows])

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
        return FoldedPoolingAttention(queries, keys, values, self.proj, scaled(self.dconv, 1 / factor), factor)


def along_axes(q: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q . R_h and q . R_w (MViTv2, equation 4), of every query and the keys along one axis.

    Shape: q (B, H, h' * w', D), down (h', h, D), across (w', w, D) -> (B, H, h' * w', h) and (B, H, h' * w', w).
    """
    q = q.unflatten(2, (down.shape[0], across.shape[0]))  # (B, H, h', w', D)
    vertical = (q @ down.transpose(1, 2)).flatten(2, 3)
    return vertical, (q.transpose(2, 3) @ across.transpose(1, 2)).transpose(2, 3).flatten(2, 3)


def of_pairs(vertical: torch.Tensor, horizontal: torch.Tensor) -> torch.Tensor:
    """q . R_h + q . R_w of every query and every key: (B, H, n, h), (B, H, n, w) -> (B, H, n, h * w)."""
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
    """Linear, pooling and norm of one of q, k, v, as exported. Shape: (B, h * w, C_in) -> (B, h' * w', H, D).

    The norm keeps its affine part: what follows normalises over the same channels or adds to them (rule 8).
    """

    def __init__(self, linear: nn.Linear, pool: nn.Conv2d, norm: nn.LayerNorm, heads: int, grid: Size) -> None:
        super().__init__()
        self.linear, self.pool, self.norm, self.heads, self.grid = linear, pool, norm, heads, grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = as_tokens(self.pool(as_map(self.linear(x), self.grid)))  # (B, N', C)
        return self.norm(heads_of(pooled, self.heads))

    def after(self, affine: Affine) -> Pooled:
        """What takes an input that was scaled and shifted per channel before (rule 7)."""
        return Pooled(affine_before(self.linear, affine), self.pool, self.norm, self.heads, self.grid)


class FoldedPoolingAttention(nn.Module):
    """PoolingAttention as it is exported, `dconv` and the values' norm scaled: (B, N, C_in) -> (B, N', C)."""

    def __init__(
        self, query: Pooled, key: Pooled, value: Pooled, output: nn.Module, dconv: nn.Conv2d, value_factor: float
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output, self.dconv = query, key, value, output, dconv
        self.value_factor = value_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x)
        return self.output((folded_attend(q, self.key(x), self.value(x), self.dconv) + q).flatten(-2))

    def after(self, affine: Affine) -> FoldedPoolingAttention:
        """The attention whose input was scaled and shifted per channel before (rule 7)."""
        query, key, value = (part.after(affine) for part in (self.query, self.key, self.value))
        return FoldedPoolingAttention(query, key, value, self.output, self.dconv, self.value_factor)


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
        q = self.query(x).transpose(1, 2)  # (B, H, N', D)
        logits = q @ self.key(x).permute(0, 2, 3, 1)  # (B, H, N', N'')
        if self.down is not None and self.across is not None:
            logits = logits + of_pairs(*along_axes(q, self.down, self.across))
        return self.output(join_heads(logits.softmax(-1) @ self.value(x).transpose(1, 2) + q))

    def after(self, affine: Affine) -> FoldedPoolingSoftmax:
        """The attention whose input was scaled and shifted per channel before (rule 7)."""
        query, key, value = (part.after(affine) for part in (self.query, self.key, self.value))
        positions = None if self.down is None or self.across is None else (self.down, self.across)
        return FoldedPoolingSoftmax(query, key, value, self.output, positions)
