"""ESNet, the backbone of PicoDet (Yu et al., arXiv:2111.00902, section 3.2; PaddleDetection esnet.py).

State-dict names are those of the mmdet port (Bo396543018/Picodet_Pytorch esnet.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.fold import affine_after
from castling_deploy.models.layers import ConvNormAct

FIRST_STAGE = 2  # the blocks are called 2_1, 2_2, ...: the first convolution counts as stage 1


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """The two halves of the channels interleaved: (B, C, H, W) -> (B, C, H, W), c -> 2 c and C / 2 + c -> 2 c + 1."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class SqueezeExcite(nn.Module):
    """x * hardsigmoid(conv2(relu(conv1(mean of x)))), C / 4 channels between. Shape: (B, C, H, W) -> (B, C, H, W)."""

    fold_rule: ClassVar[str] = "hard-sigmoid's x / 6 + 1 / 2 into SE's second convolution"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels // 4, 1), act=nn.ReLU()))
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels // 4, channels, 1), act=nn.Hardsigmoid()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv2(self.conv1(x.mean((2, 3), keepdim=True)))

    def folded(self) -> nn.Module:
        conv = self.conv2.conv
        assert isinstance(conv, nn.Conv2d)
        half = torch.full((conv.out_channels,), 0.5, dtype=torch.float64)
        return FoldedSqueezeExcite(self.conv1, affine_after(conv, (half / 3, half)))


class FoldedSqueezeExcite(nn.Module):
    """SqueezeExcite as it is exported: the gate is its second convolution cut to 0..1 (rule 28 of docs/folds.md).

    Not nn.Hardtanh: torch.export leaves its default bounds out, which coremltools 9.0 and ExecuTorch 1.5.1 then miss.
    """

    def __init__(self, squeeze: nn.Module, excite: nn.Conv2d) -> None:
        super().__init__()
        self.conv1, self.conv2 = squeeze, excite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv2(self.conv1(x.mean((2, 3), keepdim=True))).clamp(0, 1)


class InvertedResidual(nn.Module):
    """ESNet's block of stride 1: half of the channels passes by. Shape: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.conv_pw = ConvNormAct(width // 2, middle // 2)
        self.conv_dw = ConvNormAct(middle // 2, middle // 2, 3, groups=middle // 2, act=nn.Identity)
        self.se = SqueezeExcite(middle)
        self.conv_linear = ConvNormAct(middle, width // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        kept, x = x[:, :half], x[:, half:]  # slices: a split ends an XNNPACK delegate (ExecuTorch 1.5.1)
        x = self.conv_pw(x)
        x = self.se(torch.cat([x, self.conv_dw(x)], dim=1))  # (B, middle, H, W)
        return shuffled(torch.cat([kept, self.conv_linear(x)], dim=1))


class InvertedResidualDownsample(nn.Module):
    """ESNet's block of stride 2. Shape: (B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, width_in: int, width: int, middle: int) -> None:
        super().__init__()
        half = middle // 2
        self.conv_dw_1 = ConvNormAct(width_in, width_in, 3, 2, groups=width_in, act=nn.Identity)
        self.conv_linear_1 = ConvNormAct(width_in, width // 2)
        self.conv_pw_2 = ConvNormAct(width_in, half)
        self.conv_dw_2 = ConvNormAct(half, half, 3, 2, groups=half, act=nn.Identity)
        self.se = SqueezeExcite(half)
        self.conv_linear_2 = ConvNormAct(half, width // 2)
        self.conv_dw_mv1 = ConvNormAct(width, width, 3, groups=width)
        self.conv_pw_mv1 = ConvNormAct(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.conv_linear_1(self.conv_dw_1(x))
        second = self.conv_linear_2(self.se(self.conv_dw_2(self.conv_pw_2(x))))
        return self.conv_pw_mv1(self.conv_dw_mv1(torch.cat([first, second], dim=1)))


class ESNet(nn.Module):
    """Shape: (B, channels, H, W) -> one map per stage, (B, widths[i], H / s, W / s) with s = 8, 16, 32.

    `stem` is the width of the first convolution, `middles` has the inner width of every block, stage by stage.
    """

    def __init__(self, channels: int, stem: int, widths: Sequence[int], middles: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, stem, 3, 2)
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self.depths = tuple(len(stage) for stage in middles)
        for number, (width_in, width, stage) in enumerate(zip([stem, *widths], widths, middles), FIRST_STAGE):
            self.add_module(f"{number}_1", InvertedResidualDownsample(width_in, width, stage[0]))
            for block, middle in enumerate(stage[1:], 2):
                self.add_module(f"{number}_{block}", InvertedResidual(width, middle))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.max_pool(self.conv1(image))
        features = []
        for number, depth in enumerate(self.depths, FIRST_STAGE):
            for block in range(1, depth + 1):
                x = self.get_submodule(f"{number}_{block}")(x)
            features.append(x)
        return tuple(features)
