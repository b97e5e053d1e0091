"""Segmenters: the Semantic-FPN decoder on Castling backbones.

The paper's own decoder is not published; this is the project's choice (semantic_fpn.py). A Castling-LeViT backbone ends
at stride 32; Castling-DeiT has one scale, of which a small pyramid makes four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from castling_deploy.models.deit_family import DeiTFamily
from castling_deploy.models.dense import BackboneFamily, DenseConfig, DenseFamily
from castling_deploy.models.family import Output, Size, Tensors, tensor
from castling_deploy.models.levit_config import up_to_stride_32
from castling_deploy.models.levit_family import LeViTFamily
from castling_deploy.models.mvit_family import MViTv2Family
from castling_deploy.models.semantic_fpn import STRIDES, SemanticFpnHead

ADE20K_CLASSES = 150
DEFAULT_SIZE = (512, 512)


@dataclass(frozen=True)
class SemanticFpn:
    """The decoder, of `width` channels in every branch."""

    task: ClassVar[str] = "segmentation"
    multiple: ClassVar[int] = STRIDES[0]
    # mmsegmentation's pictures are resized to cover 512 x 512, and nothing is cropped but what sticks out
    preprocessing: ClassVar[Mapping[str, Any]] = {"resize_kernel": "bilinear", "crop_fraction": 1.0}
    reference: ClassVar[str] = "Semantic FPN: arXiv:1901.02446"

    width: int = 128

    @staticmethod
    def recognises(tensors: Tensors) -> bool:
        return "decode_head.conv_seg.weight" in tensors

    @classmethod
    def of(cls, tensors: Tensors) -> tuple[Self, int]:
        classes, width = tensor(tensors, "decode_head.conv_seg.weight").shape[:2]
        return cls(width), classes

    def parts(self, channels: tuple[int, ...], scaling: nn.Module | None, classes: int) -> Mapping[str, nn.Module]:
        head = {"decode_head": SemanticFpnHead(channels, self.width, classes)}
        return head if scaling is None else {"neck": scaling, **head}

    def outputs(self, classes: int, image_size: Size) -> tuple[Output, ...]:
        return (Output("logits", (classes, *image_size), "CHW"),)


def levit_segmenter() -> DenseFamily:
    """Castling-LeViT, two stages of it, with Semantic FPN."""
    return _segmenter(LeViTFamily(), "levit", lambda config: up_to_stride_32(config, DEFAULT_SIZE))


def mvitv2_segmenter() -> DenseFamily:
    """Castling-MViTv2 with Semantic FPN."""
    return _segmenter(MViTv2Family(), "mvitv2", lambda config: replace(config, image_size=DEFAULT_SIZE))


def deit_segmenter() -> DenseFamily:
    """Castling-DeiT with a pyramid and Semantic FPN."""
    return _segmenter(DeiTFamily(), "deit", lambda config: replace(config, image_size=DEFAULT_SIZE))


def _segmenter(trunk: BackboneFamily, name: str, backbone_of: Callable[[Any], Any]) -> DenseFamily:
    """A segmenter of every variant of a backbone, those called base with a wider decoder."""
    variants = {
        f"{variant}-segmenter": DenseConfig(
            backbone_of(config), SemanticFpn(256 if "-base" in variant else 128), ADE20K_CLASSES
        )
        for variant, config in trunk.variants.items()
    }
    title = f"the {trunk.title} segmenter"
    return DenseFamily(f"castling-{name}-segmenter", f"{name}-segmenter", title, trunk, SemanticFpn, variants)
