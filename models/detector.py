"""Detectors: PicoDet (Yu et al., arXiv:2111.00902, the ESNet version of 2021.10), and its neck and head on Castling
backbones.

The paper's own wiring of Castling into a detector is not published; this is the project's choice: CSP-PAN reads the
maps of strides 8, 16 and 32. A Castling-LeViT backbone ends at stride 32, and its downsampling is linear, so that it
takes any size. State-dict names are those of the mmdet port (Bo396543018/Picodet_Pytorch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from castling_deploy.errors import ShapeError
from castling_deploy.models.csp_pan import CspPan
from castling_deploy.models.dense import DenseConfig, DenseFamily
from castling_deploy.models.esnet import ESNetFamily
from castling_deploy.models.family import Output, Size, Tensors, count, tensor
from castling_deploy.models.levit_config import up_to_stride_32
from castling_deploy.models.levit_family import LeViTFamily
from castling_deploy.models.mvit_family import MViTv2Family
from castling_deploy.models.pico_head import STRIDES, PicoHead, output_names

COCO_CLASSES = 80
DEFAULT_SIZE = (416, 416)
LEVELS = 3  # of the backbone's maps that are read, the coarsest ones; the head has one more


@dataclass(frozen=True)
class PicoDetHead:
    """CSP-PAN and PicoHead: `width` is C of both, `convs` how many separable convolutions the head has per level;
    distances are distributions over 0..`reg_max` strides. The defaults are PicoDet-S's."""

    task: ClassVar[str] = "detection"
    multiple: ClassVar[int] = 32  # the stride of the coarsest map that is read
    # the whole picture is resized, its ratio is not kept (mmdet port, configs/picodet)
    preprocessing: ClassVar[Mapping[str, Any]] = {
        "resize_kernel": "bilinear",
        "crop_fraction": 1.0,
        "keep_ratio": False,
    }
    reference: ClassVar[str] = "PicoDet: arXiv:2111.00902"

    width: int = 96
    convs: int = 2
    reg_max: int = 7

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ShapeError(f"CSP-PAN splits its channels in two, {self.width} are odd", hint="use an even width")

    @staticmethod
    def recognises(tensors: Tensors) -> bool:
        return "bbox_head.gfl_cls.0.weight" in tensors

    @classmethod
    def of(cls, tensors: Tensors) -> tuple[Self, int]:
        values, width = tensor(tensors, "bbox_head.gfl_cls.0.weight").shape[:2]
        bins = tensor(tensors, "bbox_head.integral.project").shape[0]
        return cls(width, count(tensors, "bbox_head.cls_convs.0."), bins - 1), values - 4 * bins

    def parts(self, channels: tuple[int, ...], scaling: nn.Module | None, classes: int) -> Mapping[str, nn.Module]:
        assert scaling is None, "a backbone of one scale has no finer map for small objects"
        return {
            "neck": CspPan(channels[-LEVELS:], self.width),
            "bbox_head": PicoHead(classes, self.width, self.convs, self.reg_max),
        }

    def outputs(self, classes: int, image_size: Size) -> tuple[Output, ...]:
        sizes = [math.prod(math.ceil(side / stride) for side in image_size) for stride in STRIDES]
        shapes = [(size, width) for width in (classes, 4 * (self.reg_max + 1)) for size in sizes]  # scores, distances
        return tuple(Output(name, shape, "LC") for name, shape in zip(output_names(), shapes, strict=True))


def picodet() -> DenseFamily:
    """PicoDet S, M and L: no attention, nothing to cast; the convolutional baseline of the detectors."""
    trunk = ESNetFamily()
    heads = {"s": PicoDetHead(), "m": PicoDetHead(128, 4), "l": PicoDetHead(160, 4)}
    variants = {
        f"picodet-{size}": DenseConfig(trunk.variants[f"esnet-{size}"], head, COCO_CLASSES)
        for size, head in heads.items()
    }
    return DenseFamily("picodet", None, "PicoDet", trunk, PicoDetHead, variants)


def levit_detector() -> DenseFamily:
    """Castling-LeViT, two stages of it, with PicoDet's neck and head."""
    trunk = LeViTFamily()
    variants = {
        f"{name}-detector": DenseConfig(up_to_stride_32(config, DEFAULT_SIZE), PicoDetHead(), COCO_CLASSES)
        for name, config in trunk.variants.items()
    }
    title = "the Castling-LeViT detector"
    return DenseFamily("castling-levit-detector", "levit-detector", title, trunk, PicoDetHead, variants)


def mvitv2_detector() -> DenseFamily:
    """Castling-MViTv2 with PicoDet's neck and head, as wide as PicoDet-L's."""
    trunk = MViTv2Family()
    variants = {
        f"{name}-detector": DenseConfig(replace(config, image_size=DEFAULT_SIZE), PicoDetHead(160, 4), COCO_CLASSES)
        for name, config in trunk.variants.items()
    }
    title = "the Castling-MViTv2 detector"
    return DenseFamily("castling-mvitv2-detector", "mvitv2-detector", title, trunk, PicoDetHead, variants)
