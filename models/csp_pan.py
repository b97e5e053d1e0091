"""CSP-PAN, the neck of PicoDet (arXiv:2111.00902, section 3.2; PaddleDetection csp_pan.py).

State-dict names are those of the mmdet port (Bo396543018/Picodet_Pytorch csp_pan.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from castling_deploy.models.layers import ConvNormAct, SeparableConv

KERNEL = 5  # of every depthwise convolution in neck and head


class Bottleneck(nn.Module):
    """1x1, then a separable convolution, no residual. Shape: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels)
        self.conv2 = SeparableConv(channels, KERNEL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x))


class CspLayer(nn.Module):
    """Cross stage partial layer of one bottleneck. Shape: (B, 2 C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main_conv = ConvNormAct(2 * channels, channels // 2)
        self.short_conv = ConvNormAct(2 * channels, channels // 2)
        self.blocks = nn.Sequential(Bottleneck(channels // 2))
        self.final_conv = ConvNormAct(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_conv(torch.cat([self.blocks(self.main_conv(x)), self.short_conv(x)], dim=1))


class Transformation(nn.Module):
    """Every map to the same width: maps (B, in_channels[i], h, w) -> maps (B, C, h, w)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.trans = nn.ModuleList(ConvNormAct(width, channels) for width in in_channels)

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(conv(x) for conv, x in zip(self.trans, features, strict=True))


class CspPan(nn.Module):
    """Features of any backbone, each of twice the stride of the one before, mixed top-down and bottom-up.

    Shape: maps (B, in_channels[i], H / s, W / s), s = 8, 16, 32 -> maps (B, C, ceil(H / s), ceil(W / s)) with one
    stride more, s = 8, 16, 32, 64. H and W have to be multiples of the last input's stride. Of more maps, the coarsest
    are read.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        steps = len(in_channels) - 1
        self.trans = Transformation(in_channels, channels)
        self.first_top_conv = SeparableConv(channels, KERNEL, 2)
        self.second_top_conv = SeparableConv(channels, KERNEL, 2)
        self.upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.top_down_blocks = nn.ModuleList(CspLayer(channels) for _ in range(steps))
        self.downsamples = nn.ModuleList(SeparableConv(channels, KERNEL, 2) for _ in range(steps))
        self.bottom_up_blocks = nn.ModuleList(CspLayer(channels) for _ in range(steps))

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        transformed = self.trans(features[-len(self.trans.trans) :])
        top_down = [transformed[-1]]  # coarsest first
        for block, finer in zip(self.top_down_blocks, reversed(transformed[:-1])):
            top_down.append(block(torch.cat([self.upsample(top_down[-1]), finer], dim=1)))
        mixed = [top_down.pop()]  # finest first
        for block, downsample in zip(self.bottom_up_blocks, self.downsamples):
            mixed.append(block(torch.cat([downsample(mixed[-1]), top_down.pop()], dim=1)))
        return *mixed, self.first_top_conv(transformed[-1]) + self.second_top_conv(mixed[-1])
