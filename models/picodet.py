"""PicoDet S, M and L (Yu et al., arXiv:2111.00902), the ESNet version of 2021.10: ESNet, CSP-PAN, PicoHead.

It has no attention, so there is nothing to cast: the convolutional baseline of the detectors. State-dict names are
those of the mmdet port (Bo396543018/Picodet_Pytorch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from castling_deploy.errors import ShapeError
from castling_deploy.models.csp_pan import CspPan
from castling_deploy.models.esnet import FIRST_STAGE, ESNet
from castling_deploy.models.family import OFFICIAL_THRESHOLD, AttentionKind, Output, Size, Tensors, count, tensor
from castling_deploy.models.pico_head import STRIDES, PicoHead, output_names

STRIDE = 32  # of the coarsest backbone feature


@dataclass(frozen=True)
class PicoDetConfig:
    """Hyper-parameters; the defaults are PicoDet-S's.

    `stem` is the width of ESNet's first convolution; `widths` has one entry per stage, `middles` the inner width of
    each of its blocks. `neck` is the width C of neck and head, `head_convs` how many separable convolutions the head
    has per level; distances are distributions over 0..`reg_max` strides. `aux_threshold` is what every configuration
    has; without attention it means nothing.
    """

    stem: int = 24
    widths: tuple[int, ...] = (96, 192, 384)
    middles: tuple[tuple[int, ...], ...] = ((88, 48, 48), (96, 120, 96, 120, 96, 96, 96), (192, 192, 192))
    neck: int = 96
    head_convs: int = 2
    reg_max: int = 7
    image_size: Size = (416, 416)
    channels: int = 3
    classes: int = 80
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "none"

    def __post_init__(self) -> None:
        if any(side <= 0 or side % STRIDE for side in self.image_size):
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels does not fit PicoDet's coarsest feature map",
                hint=f"use multiples of {STRIDE} for --imgsz",
            )
        odd = [width for width in (self.neck, *self.widths, *sum(self.middles, ())) if width % 2]
        if odd:
            raise ShapeError(f"PicoDet splits its channels in two, {odd[0]} are odd", hint="use even widths")


class PicoDet(nn.Module):
    """Shape: (B, C, H, W) -> scores and distances of four levels, as `PicoHead` says."""

    def __init__(self, config: PicoDetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ESNet(config.channels, config.stem, config.widths, config.middles)
        self.neck = CspPan(config.widths, config.neck)
        self.bbox_head = PicoHead(config.classes, config.neck, config.head_convs, config.reg_max)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.bbox_head(self.neck(self.backbone(image)))


VARIANTS: Mapping[str, PicoDetConfig] = {
    "picodet-s": PicoDetConfig(),
    "picodet-m": PicoDetConfig(
        widths=(128, 256, 512),
        middles=((112, 64, 128), (160, 128, 192, 160, 160, 128, 160), (512, 320, 384)),
        neck=128,
        head_convs=4,
    ),
    "picodet-l": PicoDetConfig(
        widths=(160, 320, 640),
        middles=((144, 80, 160), (200, 160, 240, 200, 200, 160, 200), (640, 400, 480)),
        neck=160,
        head_convs=4,
        image_size=(640, 640),
    ),
}


class PicoDetFamily:
    """Recognises, builds and resizes PicoDet."""

    name = "picodet"
    baseline = None
    title = "PicoDet"
    task = "detection"
    # the whole picture is resized, its ratio is not kept (mmdet port, configs/picodet)
    preprocessing: Mapping[str, Any] = {"resize_kernel": "bilinear", "crop_fraction": 1.0, "keep_ratio": False}
    reference = "arXiv:2111.00902"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return {"backbone.2_1.conv_pw_2.conv.weight", "bbox_head.gfl_cls.0.weight"} <= tensors.keys()

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> PicoDetConfig:
        stem, channels = tensor(tensors, "backbone.conv1.conv.weight").shape[:2]
        stages = range(FIRST_STAGE, FIRST_STAGE + 3)
        widths = tuple(tensor(tensors, f"backbone.{stage}_1.conv_pw_mv1.conv.weight").shape[0] for stage in stages)
        outputs, neck = tensor(tensors, "bbox_head.gfl_cls.0.weight").shape[:2]
        bins = tensor(tensors, "bbox_head.integral.project").shape[0]
        published = (variant.image_size for variant in VARIANTS.values() if variant.widths == widths)
        return PicoDetConfig(
            stem=stem,
            widths=widths,
            middles=tuple(_middles(tensors, stage) for stage in stages),
            neck=neck,
            head_convs=count(tensors, "bbox_head.cls_convs.0."),
            reg_max=bins - 1,
            image_size=image_size or next(published, PicoDetConfig.image_size),
            channels=channels,
            classes=outputs - 4 * bins,
            aux_threshold=aux_threshold,
        )

    def build(self, config: PicoDetConfig) -> nn.Module:
        return PicoDet(config)

    def outputs(self, config: PicoDetConfig) -> tuple[Output, ...]:
        sizes = [math.prod(math.ceil(side / stride) for side in config.image_size) for stride in STRIDES]
        widths = (config.classes, 4 * (config.reg_max + 1))
        shapes = [(size, width) for width in widths for size in sizes]  # scores of every level, then distances
        return tuple(Output(name, shape, "LC") for name, shape in zip(output_names(), shapes, strict=True))

    def resized(self, tensors: Tensors, config: PicoDetConfig, image_size: Size) -> tuple[Tensors, PicoDetConfig]:
        return tensors, replace(config, image_size=image_size)


def _middles(tensors: Tensors, stage: int) -> tuple[int, ...]:
    """The inner width of every block of a stage."""
    first = 2 * tensor(tensors, f"backbone.{stage}_1.conv_pw_2.conv.weight").shape[0]
    rest = range(2, count(tensors, f"backbone.{stage}_") + 1)
    return first, *(2 * tensor(tensors, f"backbone.{stage}_{block}.conv_pw.conv.weight").shape[0] for block in rest)
