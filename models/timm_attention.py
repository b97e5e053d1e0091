"""Our attentions as timm's blocks call them: timm's signatures, the same parameters under the same names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from castling_deploy.errors import FoldError, ShapeError, UsageError
from castling_deploy.models.attention import LinearAngularAttention
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.mvit_attention import PoolingAttention
from castling_deploy.models.mvit_config import MViTv2Config, Place


class VisionTransformerAttention(LinearAngularAttention):
    """LinearAngularAttention in the blocks of timm's VisionTransformer, with its dropout after the projection.

    Shape: (B, N, C) -> (B, N, C). Raises UsageError for a mask: the N x N matrix that it is added to is never formed.
    """

    def __init__(self, config: DeiTConfig, dropout: float) -> None:
        tokens = config.prefix + math.prod(config.grid)
        super().__init__(config.width, config.heads, config.qkv_bias, config.kernel, config.aux_threshold, tokens)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        if attn_mask is not None or is_causal:
            raise UsageError("linear-angular attention takes no mask", hint="call the network without attn_mask")
        return self.proj_drop(super().forward(x))

    def folded(self) -> nn.Module:
        raise unfoldable()


class MultiScaleVitAttention(PoolingAttention):
    """PoolingAttention in the blocks of timm's MultiScaleVit, which hand the token grid on.

    Shape: (B, h * w, C_in), (h, w) -> (B, h' * w', C), (h', w'). Raises ShapeError for the grid of another image size.
    """

    def __init__(self, place: Place, config: MViTv2Config) -> None:
        super().__init__(place, config)
        self.image_size = config.image_size

    def forward(  # type: ignore[override]  # timm's own signature
        self, x: torch.Tensor, feat_size: Sequence[int]
    ) -> tuple[torch.Tensor, list[int]]:
        if tuple(feat_size) != self.place.grid:
            height, width = self.image_size
            raise ShapeError(
                f"a grid of {' x '.join(map(str, feat_size))} tokens in a network for {height} x {width} pixels",
                hint="give timm.create_model the img_size of your images",
            )
        return super().forward(x), list(self.place.queries)

    def folded(self) -> nn.Module:
        raise unfoldable()


def unfoldable() -> FoldError:
    """A fold rewrites a block and its attention together, and timm's blocks know none."""
    return FoldError(
        "the blocks of a timm network cannot be folded",
        hint="castling_deploy.export takes it as it is; its saved state_dict() loads as a network that folds",
    )
