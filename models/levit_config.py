"""Castling-LeViT: hyper-parameters and published variants (Graham et al., ICCV 2021; facebookresearch/LeViT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from castling_deploy.errors import ShapeError
from castling_deploy.models.family import OFFICIAL_THRESHOLD, AttentionKind, Size, with_baselines

STEM_STRIDE = 16  # four convolutions of stride 2


@dataclass(frozen=True)
class LeViTConfig:
    """Hyper-parameters; the defaults are Castling-LeViT-128S's.

    One entry per stage in `widths` (C), `heads` and `depths`; `key_dim` is D, values have 2 D channels per head (4 D
    in the downsampling attention, which has C_in / D heads). `down` is the kind of that attention.
    """

    widths: tuple[int, ...] = (128, 256, 384)
    heads: tuple[int, ...] = (4, 6, 8)
    depths: tuple[int, ...] = (2, 3, 4)
    key_dim: int = 16
    distilled: bool = True
    image_size: Size = (224, 224)
    channels: int = 3
    classes: int = 1000
    kernel: int = 9
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "castling"
    down: Literal["softmax", "linear"] = "softmax"

    @property
    def grids(self) -> tuple[Size, ...]:
        """Tokens along height and width, per stage: 14 x 14, 7 x 7, 4 x 4 at 224 pixels."""
        grid = (math.ceil(self.image_size[0] / STEM_STRIDE), math.ceil(self.image_size[1] / STEM_STRIDE))
        grids = [grid]
        for _ in self.widths[1:]:
            grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            grids.append(grid)
        return tuple(grids)

    def __post_init__(self) -> None:
        if min(self.image_size) < STEM_STRIDE:
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels is smaller than one token of Castling-LeViT",
                hint=f"use at least {STEM_STRIDE} pixels for --imgsz",
            )
        if any(width % self.key_dim for width in self.widths[:-1]):
            raise ShapeError(
                f"widths {self.widths} are no multiples of the key dimension {self.key_dim}",
                hint="the downsampling attention has width / key_dim heads",
            )


VARIANTS: Mapping[str, LeViTConfig] = with_baselines(
    {
        "castling-levit-128s": LeViTConfig(),
        "castling-levit-128": LeViTConfig(heads=(4, 8, 12), depths=(4, 4, 4)),
        "castling-levit-192": LeViTConfig((192, 288, 384), (3, 5, 6), (4, 4, 4), 32),
        "castling-levit-256": LeViTConfig((256, 384, 512), (4, 6, 8), (4, 4, 4), 32),
        "castling-levit-384": LeViTConfig((384, 512, 768), (6, 9, 12), (4, 4, 4), 32),
    }
)


def up_to_stride_32(config: LeViTConfig, image_size: Size) -> LeViTConfig:
    """The part of a network that dense tasks use: its first two stages. Downsampling is linear in Castling, so that
    sizes other than 224 pixels cost no quadratic attention."""
    return replace(
        config,
        widths=config.widths[:2],
        heads=config.heads[:2],
        depths=config.depths[:2],
        image_size=image_size,
        distilled=False,
        down="softmax" if config.attention == "softmax" else "linear",
    )
