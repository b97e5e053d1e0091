"""Linear-angular attention: the training form, the castled form, and the folded form that is exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from castling_deploy.castle import CastEvidence
from castling_deploy.errors import FoldError, ShapeError
from castling_deploy.fold import Affine, affine_before, rows, scaled
from castling_deploy.rewrite import copied

# The official module divides by a plain norm, which is 0/0 for a zero vector. Clamping changes nothing above the bound.
NORM_FLOOR = 1e-12
# For export: the smallest normal float16, so that the constant survives every precision and is no subnormal.
EXPORT_NORM_FLOOR = 2.0**-14
# Of the softmax weights that exist at once. All of MViTv2's at 512 pixels, 8 images of 128 x 128 tokens, would take
# 8.6 GB. What fits a core's cache is faster too: 3.3 s an image of them, 6.9 s with 2**26, 4.8 s with 2**20.
MAP_BYTES = 2**22


def unit(x: torch.Tensor, floor: float = NORM_FLOOR) -> torch.Tensor:
    """x / max(||x||, floor) over the last axis."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(floor)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, H * D) -> (B, N, H, D), as the exported forms take it: nothing is moved."""
    return x.unflatten(-1, (heads, -1))


class FirstTokens(nn.Module):
    """The first tokens alone: (..., N, C) -> (..., count, C)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.count, :]


def split_qkv(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, 3 C) -> q, k, v (B, H, N, D). The channels are [q | k | v], inside each [head 0 | head 1 | ...]."""
    q, k, v = qkv.chunk(3, dim=-1)
    return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)


def thirds(qkv: nn.Linear) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The Linears of q, k and v (rule 29)."""
    q, k, v = torch.arange(qkv.out_features).chunk(3)
    return rows(qkv, q), rows(qkv, k), rows(qkv, v)


def scaled_products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k^T / sqrt(D): q (B, H, N', D), k (B, H, N, D) -> (B, H, N', N)."""
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def token_conv(heads: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution along the tokens, one kernel per head: (B, H, N, D) -> (B, H, N, D)."""
    if kernel % 2 == 0:
        raise ShapeError(
            f"a token convolution of {kernel} taps would change the number of tokens", hint="use an odd kernel size"
        )
    return nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)


def value_scale(tokens: int) -> float:
    """The factor on the values of the folded form: the power of two at or below N^-1/2.

    ||o||^2 of correlated values grows with N^2 (8.6e4 for unit values at N = 197), c^2 takes 1/N of it: 3.4e2, which
    leaves room for values 14 times larger. 1/N itself would be safer there, but turns 13 to 26 % of the value weights
    of DeiT into float16 subnormals at N = 197 (this c: 1 %). A power of two costs no rounding.
    """
    return 2.0 ** math.floor(-0.5 * math.log2(tokens))


def linear_angular(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """own / 2 + (1 / pi) q^ (k^^T v), the linear terms of the angular kernel (arXiv:2211.10526, section 3.2).

    `own` are the values of the querying tokens: v itself, unless only some tokens ask. Linear in the number of tokens.
    Shape: q (B, H, N', D), k (B, H, N, D), v (B, H, N, E), own (B, H, N', E) -> (B, H, N', E).
    """
    state = unit(k).transpose(-2, -1) @ v  # (B, H, D, E)
    return 0.5 * (v if own is None else own) + (1 / math.pi) * (unit(q) @ state)


def masked(weights: torch.Tensor, threshold: float) -> torch.Tensor:
    """The auxiliary branch's weights (section 3.3): a softmax's, up to the threshold zeroed, not renormalised."""
    return weights * (weights > threshold)


# Logits of some of the queries: rows -> (B, H, n, N).
Logits = Callable[[slice], torch.Tensor]
# Which tokens ask: (B, H, N, E) -> (B, H, N', E).
Selection = Callable[[torch.Tensor], torch.Tensor]


def all_tokens(x: torch.Tensor) -> torch.Tensor:
    """Every token asks."""
    return x


@runtime_checkable
class Attention(Protocol):
    """What the attentions of all families have in common once x has become q, k and v.

    `dconv` is None in a softmax baseline, `aux_threshold` there and once the auxiliary branch is cast away.
    """

    aux_threshold: float | None

    @property
    def dconv(self) -> nn.Conv2d | None:
        """The token convolution."""

    def logits(self, q: torch.Tensor, k: torch.Tensor) -> Logits:
        """Those of the softmax, for q (B, H, N', D) and k (B, H, N, D)."""


def softmaxes(attention: Attention, q: torch.Tensor, k: torch.Tensor) -> Iterator[torch.Tensor]:
    """softmax(logits) of some queries after the other: (B, H, n, N), of MAP_BYTES or one query.

    All at once where they are differentiated (autograd keeps every one, and a GPU likes few and large products), and in
    a graph that is traced.
    """
    logits, queries = attention.logits(q, k), q.shape[2]
    row_bytes = k.shape[:-1].numel() * k.element_size()
    at_once = q.requires_grad or torch.compiler.is_compiling()
    rows = queries if at_once else max(1, MAP_BYTES // row_bytes)
    for first in range(0, queries, rows):
        yield logits(slice(first, min(first + rows, queries))).softmax(-1)


def attend(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asking: Selection = all_tokens
) -> torch.Tensor:
    """N(v / 2 + q^ (k^^T v) / pi + P v) + dconv(v); in a softmax baseline softmax(logits) v.

    Shape: q (B, H, N', D), k (B, H, N, D), v (B, H, N, E) -> (B, H, N', E).
    """
    if attention.dconv is None:
        return torch.cat([weights @ v for weights in softmaxes(attention, q, k)], dim=2)
    core, threshold = linear_angular(q, k, v, asking(v)), attention.aux_threshold
    if threshold is not None:
        core = core + torch.cat([masked(weights, threshold) @ v for weights in softmaxes(attention, q, k)], dim=2)
    return unit(core) + asking(attention.dconv(v))


def branch_evidence(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asking: Selection = all_tokens
) -> CastEvidence | None:
    """What casting the branch of this attention away loses; None where there is none. Shapes as in `attend`."""
    threshold = attention.aux_threshold
    if threshold is None:
        return None
    peak, unmasked, lost = 0.0, 0, []
    for softmax in softmaxes(attention, q, k):
        peak = max(peak, softmax.max().item())
        weights = masked(softmax, threshold)
        unmasked += int(weights.count_nonzero())
        lost.append((weights @ v).norm(dim=-1))  # (B, H, n)
    kept = linear_angular(q, k, v, asking(v)).norm(dim=-1).clamp_min(NORM_FLOOR)
    mixed = torch.cat(lost, dim=-1)  # (B, H, N')
    return CastEvidence(
        tokens=k.shape[2],
        threshold=threshold,
        mask_density=unmasked / (mixed.numel() * k.shape[2]),
        peak=peak,
        contribution=(mixed.square().mean() / kept.square().mean()).sqrt().item(),
        contribution_max=(mixed / kept).max().item(),
    )


def cast_before_fold(attention: Attention) -> None:
    """Raises FoldError while the auxiliary branch is there: the folded forms have none."""
    if attention.aux_threshold is not None:
        raise FoldError("an auxiliary branch is still there", hint="call castle() before fold()")


def was_cast(network: nn.Module) -> bool:
    """Whether auxiliary branches of `network` were cast away. Tensors do not always tell: DeiT's branch has none."""
    attentions = (module for module in network.modules() if isinstance(module, Attention))
    return any(attention.aux_threshold is None and attention.dconv is not None for attention in attentions)


class LinearAngularAttention(nn.Module):
    """Linear-angular attention (You et al., CVPR 2023; GATECH-EIC/Castling-ViT attention.py), in DeiT's wiring.

    y = N(v / 2 + q^ (k^^T v) / pi + P v) + dconv(v), N being the L2 normalisation over a head's channels and P the
    masked softmax of the auxiliary branch, present while `aux_threshold` is a number. Parameters have the names and
    shapes of the official module: `qkv`, `proj`, `dconv`. `tokens`, where it is known, only sets the range of the
    folded form's intermediates.

    Shape: (B, N, C) -> (B, N, C). Raises ShapeError when C is not a multiple of the number of heads.
    """

    fold_rule: ClassVar[str] = "attention constants"

    def __init__(
        self,
        channels: int,
        heads: int = 8,
        qkv_bias: bool = False,
        kernel: int = 9,
        aux_threshold: float | None = 0.02,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ShapeError(
                f"{channels} channels cannot be split over {heads} heads",
                hint="choose a number of heads that divides the channels",
            )
        self.heads, self.tokens = heads, tokens
        self.aux_threshold = aux_threshold
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.dconv = token_conv(heads, kernel)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, N, C) -> q, k, v (B, H, N, D)."""
        return split_qkv(self.qkv(x), self.heads)

    @staticmethod
    def logits(q: torch.Tensor, k: torch.Tensor) -> Logits:
        """The auxiliary branch's, of q and k as they are (not normalised)."""
        return lambda rows: scaled_products(q[:, :, rows], k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(join_heads(attend(self, *self.split(x))))

    def cast_evidence(self, x: torch.Tensor) -> CastEvidence | None:
        return branch_evidence(self, *self.split(x))

    def castled(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, LinearAngularAttention)
        twin.aux_threshold = None
        return twin

    def folded(self) -> nn.Module:
        cast_before_fold(self)
        return FoldedAttention(*thirds(self.qkv), self.dconv, self.proj, heads=self.heads, tokens=self.tokens)


class SoftmaxAttention(nn.Module):
    """ViT's softmax attention, for the softmax baseline of DeiT. Shape: (B, N, C) -> (B, N, C)."""

    fold_rule: ClassVar[str] = "softmax scale into the queries"

    def __init__(self, channels: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split_qkv(self.qkv(x), self.heads)
        return self.proj(join_heads(scaled_products(q, k).softmax(-1) @ v))

    def folded(self) -> nn.Module:
        query, key, value = thirds(self.qkv)
        query = scaled(query, (query.out_features // self.heads) ** -0.5)
        return FoldedSoftmaxAttention(query, key, value, self.proj, heads=self.heads)


def folded_attend(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, dconv: nn.Conv2d, asking: Selection = all_tokens
) -> torch.Tensor:
    """What `attend` computes of v = u / c after the cast, with fewer and better conditioned operations.

    The last normalisation is blind to a positive factor, so v / 2 + q^ S / pi may be scaled by 2 c: with u = c v and
    a dconv that takes 1 / c back,

        y = N(u + q^ ((2 / pi) k^^T u)) + dconv(u)             (rules 11, 12 and 17 of docs/folds.md)

    Without c the square sum of N(.) passes float16's 65504 at 197 tokens. `value_scale` says what c is.

    Heads stand behind tokens, as a Linear leaves them, until a product needs them in front: runtimes take such a
    transposition into the product (ONNX Runtime: FusedMatMul). Only u and y are moved.
    Shape: q (B, N', H, D), k (B, N, H, D), u (B, N, H, E) -> (B, N', H, E); `asking` picks from (B, H, N, E).
    """
    values = u.transpose(1, 2)  # (B, H, N, E)
    state = unit(k, EXPORT_NORM_FLOOR).permute(0, 2, 3, 1) @ values * (2 / math.pi)  # (B, H, D, E)
    core = asking(values) + unit(q, EXPORT_NORM_FLOOR).transpose(1, 2) @ state  # (B, H, N', E)
    return (unit(core, EXPORT_NORM_FLOOR) + asking(dconv(values))).transpose(1, 2)


class FoldedAttention(nn.Module):
    """The castled attention as it is exported: `folded_attend` between separate Linears.

    `asking` picks the tokens that ask, from (..., N, C). Shape: (B, N, C) -> (B, N', C_out), C_out being the output's.
    """

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        dconv: nn.Conv2d,
        output: nn.Module,
        *,
        heads: int,
        tokens: int | None,
        asking: nn.Module | None = None,
    ) -> None:
        super().__init__()
        factor = 1.0 if tokens is None else value_scale(tokens)
        self.heads = heads
        self.value_factor = factor  # a fact about the weights, for whoever looks at their range
        self.query, self.key, self.value = query, key, scaled(value, factor)
        self.dconv = scaled(dconv, 1 / factor)
        self.output = output
        self.asking = asking or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = heads_of(self.query(self.asking(x)), self.heads)
        k, u = heads_of(self.key(x), self.heads), heads_of(self.value(x), self.heads)
        return self.output(folded_attend(q, k, u, self.dconv, self.asking).flatten(-2))

    def after(self, affine: Affine) -> FoldedAttention:
        """The attention whose input was scaled and shifted per channel before (rule 7): q, k and v all take it."""
        query, key, value = (affine_before(linear, affine) for linear in (self.query, self.key, self.value))
        return self._with(query, key, value, self.asking)

    def asked_by(self, asking: nn.Module) -> FoldedAttention:
        """The attention that answers the tokens of `asking` alone (rule 30)."""
        return self._with(self.query, self.key, self.value, asking)

    def _with(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, asking: nn.Module) -> FoldedAttention:
        twin = FoldedAttention(query, key, value, self.dconv, self.output, heads=self.heads, tokens=None, asking=asking)
        twin.value_factor = self.value_factor
        return twin


class FoldedSoftmaxAttention(nn.Module):
    """Softmax attention as it is exported, the logits' scale in the query's weights (rule 22).

    `bias`, if any, is added to the logits (H, N', N); `asking` picks the tokens that ask, from (..., N, C).
    Shape: (B, N, C) -> (B, N', C_out), C_out being the output's.
    """

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        output: nn.Module,
        *,
        heads: int,
        bias: torch.Tensor | None = None,
        asking: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = query, key, value, output
        self.bias = None if bias is None else nn.Buffer(bias)
        self.asking = asking or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = split_heads(self.query(self.asking(x)), self.heads)
        k, v = split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)
        logits = q @ k.transpose(-2, -1)  # (B, H, N', N)
        if self.bias is not None:
            logits = logits + self.bias
        return self.output(join_heads(logits.softmax(-1) @ v))

    def after(self, affine: Affine) -> FoldedSoftmaxAttention:
        """The attention whose input was scaled and shifted per channel before (rule 7)."""
        query, key, value = (affine_before(linear, affine) for linear in (self.query, self.key, self.value))
        return self._with(query, key, value, self.asking)

    def asked_by(self, asking: nn.Module) -> FoldedSoftmaxAttention:
        """The attention that answers the tokens of `asking` alone (rule 30)."""
        return self._with(self.query, self.key, self.value, asking)

    def _with(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, asking: nn.Module) -> FoldedSoftmaxAttention:
        return FoldedSoftmaxAttention(query, key, value, self.output, heads=self.heads, bias=self.bias, asking=asking)
