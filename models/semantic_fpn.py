"""Semantic FPN (Kirillov et al., CVPR 2019, arXiv:1901.02446): segmentation from four feature maps of any backbone.

The paper's own decoder is not published; this is the project's choice, a decoder of convolutions and bilinear resizing
that every target has. Structure and state-dict names are those of mmsegmentation (fpn_head.py, featurepyramid.py): a
network calls the head `decode_head` and, over a backbone of a single scale, the pyramid `neck`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.fold import affine_after_transposed, batchnorm_affine
from castling_deploy.models.layers import ConvNormAct

STRIDES = (4, 8, 16, 32)


def resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear; x itself where it has that size."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return nn.functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class SemanticFpnHead(nn.Module):
    """A branch per map brings it to stride 4, the sum is classified there and enlarged to the image.

    Shape: maps (B, in_channels[i], H / s, W / s), s = 4, 8, 16, 32 -> logits (B, classes, H, W). Maps whose size was
    rounded, where H or W is no multiple of 32, are resized to the finest one's.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 128, classes: int = 150) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList(
            branch(width, channels, doublings) for doublings, width in enumerate(in_channels)
        )
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        finest, *others = (head(x) for head, x in zip(self.scale_heads, features, strict=True))
        for x in others:
            finest = finest + resized(x, finest.shape[-2:])
        logits = self.conv_seg(finest)  # (B, classes, H / 4, W / 4)
        return nn.functional.interpolate(logits, scale_factor=float(STRIDES[0]), mode="bilinear", align_corners=False)


def branch(channels_in: int, channels: int, doublings: int) -> nn.Sequential:
    """Convolutions, each followed by a bilinear doubling: (B, C_in, h, w) -> (B, C, 2^doublings h, 2^doublings w).

    Without a doubling it is a single convolution.
    """
    layers: list[nn.Module] = []
    for width_in in [channels_in, *[channels] * (doublings - 1)]:
        layers.append(ConvNormAct(width_in, channels, 3, act=nn.ReLU))
        if doublings:
            layers.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


class Quadrupling(nn.Sequential):
    """Two transposed convolutions of stride 2, BatchNorm and GELU between. Shape: (B, C, h, w) -> (B, C, 4 h, 4 w)."""

    fold_rule: ClassVar[str] = "ConvTranspose+BN"

    def __init__(self, channels: int) -> None:
        super().__init__(doubling(channels), nn.BatchNorm2d(channels), nn.GELU(), doubling(channels))

    def folded(self) -> nn.Module:
        first, norm, act, second = self
        assert isinstance(first, nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d)
        return nn.Sequential(affine_after_transposed(first, batchnorm_affine(norm)), act, second)


def doubling(channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution whose patches do not overlap: (B, C, h, w) -> (B, C, 2 h, 2 w)."""
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


class FeaturePyramid(nn.Module):
    """Four scales from a backbone that has one, as plain ViTs do: four maps of stride 16 become strides 4, 8, 16, 32.

    Shape: maps (B, C, h, w) -> maps (B, C, 4 h, 4 w), (B, C, 2 h, 2 w), (B, C, h, w), (B, C, h // 2, w // 2).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample_4x = Quadrupling(channels)
        self.upsample_2x = nn.Sequential(doubling(channels))
        self.halve = nn.MaxPool2d(2)

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        fine, middle, same, coarse = features
        return self.upsample_4x(fine), self.upsample_2x(middle), same, self.halve(coarse)
