"""Small layers that the families share. State-dict names follow timm (`linear`, `bn`)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from castling_deploy.fold import Affine, affine_after, affine_before, batchnorm_affine


class ConvNorm(nn.Module):
    """Conv2d without bias, then BatchNorm2d. Shape: (B, C_in, H, W) -> (B, C_out, H', W')."""

    fold_rule: ClassVar[str] = "Conv+BN"

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.linear(x))

    def folded(self) -> nn.Module:
        return affine_after(self.linear, batchnorm_affine(self.bn))


class LinearNorm(nn.Module):
    """Linear without bias, then BatchNorm1d over all B * N tokens. Shape: (B, N, C_in) -> (B, N, C_out)."""

    fold_rule: ClassVar[str] = "Linear+BN"

    def __init__(self, channels_in: int, channels_out: int, gamma: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(channels_in, channels_out, bias=False)
        self.bn = nn.BatchNorm1d(channels_out)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.bn.weight, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).view_as(x)

    def folded(self) -> nn.Module:
        return affine_after(self.linear, batchnorm_affine(self.bn))


class NormLinear(nn.Module):
    """BatchNorm1d, then Linear: LeViT's classifier. Shape: (B, C) -> (B, classes)."""

    fold_rule: ClassVar[str] = "BN+Linear"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.bn(x))

    def folded(self) -> nn.Module:
        return affine_before(self.linear, batchnorm_affine(self.bn))


class Mlp(nn.Module):
    """fc1, GELU (the erf form), fc2. Shape: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))

    def after(self, affine: Affine) -> Mlp:
        """The Mlp whose input was scaled and shifted per channel before (rule 7)."""
        twin = Mlp.__new__(Mlp)
        nn.Module.__init__(twin)
        twin.fc1, twin.fc2 = affine_before(self.fc1, affine), self.fc2
        return twin


class ConvNormAct(nn.Module):
    """Conv2d without bias, BatchNorm2d, activation, with the names of mmcv's ConvModule (`conv`, `bn`).

    The padding keeps the size at stride 1. Shape: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    fold_rule: ClassVar[str] = "Conv+BN"

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)
        self.act = act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))

    def folded(self) -> nn.Module:
        conv = affine_after(self.conv, batchnorm_affine(self.bn))
        return conv if isinstance(self.act, nn.Identity) else nn.Sequential(conv, self.act)


class SeparableConv(nn.Module):
    """A depthwise and a pointwise ConvNormAct. Shape: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvNormAct(channels, channels, kernel, stride, groups=channels)
        self.pointwise_conv = ConvNormAct(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))
