"""Castling-MViTv2: hyper-parameters and published variants (Li et al., CVPR 2022; facebookresearch/mvit)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from castling_deploy.errors import ShapeError
from castling_deploy.models.family import OFFICIAL_THRESHOLD, AttentionKind, Size, with_baselines

PATCH_STRIDE = 4
EPS = 1e-6  # of every LayerNorm


@dataclass(frozen=True)
class MViTv2Config:
    """Hyper-parameters; the defaults are Castling-MViTv2-T's.

    One entry per stage in `widths` (C), `heads` and `depths`. The first block of every stage but the first halves
    height and width. `positions`: whether the softmax (of the auxiliary branch, or the baseline's) has relative ones.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    depths: tuple[int, ...] = (1, 2, 5, 2)
    mlp_ratio: int = 4
    positions: bool = True
    image_size: Size = (224, 224)
    channels: int = 3
    classes: int = 1000
    kernel: int = 9
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "castling"

    @property
    def grids(self) -> tuple[Size, ...]:
        """Tokens along height and width, per stage: 56 x 56 to 7 x 7 at 224 pixels."""
        height, width = self.image_size
        strides = [PATCH_STRIDE << stage for stage in range(len(self.widths))]
        return tuple((height // stride, width // stride) for stride in strides)

    def __post_init__(self) -> None:
        stride = PATCH_STRIDE << (len(self.widths) - 1)
        if any(side <= 0 or side % stride for side in self.image_size):
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels cannot be halved {len(self.widths) - 1} times after patches of "
                f"{PATCH_STRIDE}",
                hint=f"use multiples of {stride} for --imgsz",
            )
        if any(width % heads for width, heads in zip(self.widths, self.heads)):
            raise ShapeError(
                f"widths {self.widths} cannot be split over {self.heads} heads",
                hint="choose numbers of heads that divide the widths",
            )


@dataclass(frozen=True)
class Place:
    """Where an attention stands: its channels, the tokens it gets, the strides that pool its queries and its keys.

    Values are pooled as keys are. `table` is the finest grid of the original's queries and keys, which its relative
    positions are counted on.
    """

    width_in: int
    width: int
    heads: int
    grid: Size
    stride: int
    key_stride: int
    table: Size

    @property
    def queries(self) -> Size:
        """Along height and width."""
        return self.grid[0] // self.stride, self.grid[1] // self.stride

    @property
    def keys(self) -> Size:
        """Along height and width."""
        return self.grid[0] // self.key_stride, self.grid[1] // self.key_stride


def place_of(config: MViTv2Config, stage: int, block: int) -> Place:
    """The original pools keys by 4, 2, 1, 1 in its stages, whatever the queries' stride; Castling as the queries."""
    enters = stage > 0 and block == 0
    before = stage - 1 if enters else stage
    grid, stride = config.grids[before], 2 if enters else 1
    original = max(4 >> stage, 1)
    finest = min(stride, original)
    key_stride = original if config.attention == "softmax" else stride
    table = grid[0] // finest, grid[1] // finest
    return Place(config.widths[before], config.widths[stage], config.heads[stage], grid, stride, key_stride, table)


VARIANTS: Mapping[str, MViTv2Config] = with_baselines(
    {
        "castling-mvitv2-tiny": MViTv2Config(),
        "castling-mvitv2-small": MViTv2Config(depths=(1, 2, 11, 2)),
        "castling-mvitv2-base": MViTv2Config(depths=(2, 3, 16, 3)),
    }
)
