"""ESNet, the backbone of PicoDet (Yu et al., arXiv:2111.00902, section 3.2; PaddleDetection esnet.py).

State-dict names are those of the mmdet port (Bo396543018/Picodet_Pytorch esnet.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.errors import ShapeError
from castling_deploy.fold import affine_after
from castling_deploy.models.family import OFFICIAL_THRESHOLD, AttentionKind, Size, Tensors, count, tensor
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


@dataclass(frozen=True)
class ESNetConfig:
    """Hyper-parameters; the defaults are those of PicoDet-S.

    `stem` is the width of the first convolution; `widths` has one entry per stage, `middles` the inner width of each of
    its blocks. `aux_threshold` is what every configuration has; without attention it means nothing.
    """

    stem: int = 24
    widths: tuple[int, ...] = (96, 192, 384)
    middles: tuple[tuple[int, ...], ...] = ((88, 48, 48), (96, 120, 96, 120, 96, 96, 96), (192, 192, 192))
    image_size: Size = (416, 416)
    channels: int = 3
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "none"

    def __post_init__(self) -> None:
        odd = [width for width in (*self.widths, *sum(self.middles, ())) if width % 2]
        if odd:
            raise ShapeError(f"ESNet splits its channels in two, {odd[0]} are odd", hint="use even widths")


class ESNet(nn.Module):
    """Shape: (B, channels, H, W) -> one map per stage, (B, widths[i], H / s, W / s) with s = 8, 16, 32."""

    def __init__(self, config: ESNetConfig) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(config.channels, config.stem, 3, 2)
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self.depths = tuple(len(stage) for stage in config.middles)
        before = [config.stem, *config.widths]
        for number, (width_in, width, stage) in enumerate(zip(before, config.widths, config.middles), FIRST_STAGE):
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


VARIANTS: Mapping[str, ESNetConfig] = {
    "esnet-s": ESNetConfig(),
    "esnet-m": ESNetConfig(
        widths=(128, 256, 512),
        middles=((112, 64, 128), (160, 128, 192, 160, 160, 128, 160), (512, 320, 384)),
    ),
    "esnet-l": ESNetConfig(
        widths=(160, 320, 640),
        middles=((144, 80, 160), (200, 160, 240, 200, 200, 160, 200), (640, 400, 480)),
        image_size=(640, 640),
    ),
}


class ESNetFamily:
    """A backbone only: no classifier of it was published."""

    title = "ESNet"
    reference = "ESNet: arXiv:2111.00902"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return f"{FIRST_STAGE}_1.conv_pw_2.conv.weight" in tensors

    def backbone_config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> ESNetConfig:
        stem, channels = tensor(tensors, "conv1.conv.weight").shape[:2]
        stages = range(FIRST_STAGE, FIRST_STAGE + 3)
        return ESNetConfig(
            stem=stem,
            widths=tuple(tensor(tensors, f"{stage}_1.conv_pw_mv1.conv.weight").shape[0] for stage in stages),
            middles=tuple(_middles(tensors, stage) for stage in stages),
            image_size=image_size or ESNetConfig.image_size,
            channels=channels,
            aux_threshold=aux_threshold,
        )

    def backbone(self, config: ESNetConfig) -> nn.Module:
        return ESNet(config)

    def scales(self, config: ESNetConfig) -> tuple[tuple[int, ...], nn.Module | None]:
        return config.widths, None

    def resized(self, tensors: Tensors, config: ESNetConfig, image_size: Size) -> tuple[Tensors, ESNetConfig]:
        return tensors, replace(config, image_size=image_size)


def _middles(tensors: Tensors, stage: int) -> tuple[int, ...]:
    """The inner width of every block of a stage."""
    first = 2 * tensor(tensors, f"{stage}_1.conv_pw_2.conv.weight").shape[0]
    rest = range(2, count(tensors, f"{stage}_") + 1)
    return first, *(2 * tensor(tensors, f"{stage}_{block}.conv_pw.conv.weight").shape[0] for block in rest)
