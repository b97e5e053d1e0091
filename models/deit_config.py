"""Castling-DeiT: hyper-parameters and published variants (Touvron et al., ICML 2021; facebookresearch/deit)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from castling_deploy.errors import ShapeError
from castling_deploy.models.family import OFFICIAL_THRESHOLD, AttentionKind, Size, with_baselines


@dataclass(frozen=True)
class DeiTConfig:
    """Hyper-parameters; the defaults are Castling-DeiT-T's. Sizes in pixels, `patch` the side of a square patch."""

    width: int = 192
    heads: int = 3
    depth: int = 12
    hidden: int = 768
    distilled: bool = False
    image_size: Size = (224, 224)
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    qkv_bias: bool = True
    kernel: int = 9
    aux_threshold: float = OFFICIAL_THRESHOLD
    attention: AttentionKind = "castling"

    @property
    def grid(self) -> Size:
        """Patches along height and width."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: the class token, and the distillation token where there is one."""
        return 2 if self.distilled else 1

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ShapeError(
                f"{self.width} channels cannot be split over {self.heads} heads",
                hint="choose a number of heads that divides the channels",
            )
        if any(side <= 0 or side % self.patch for side in self.image_size):
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels cannot be cut into patches of {self.patch}",
                hint=f"use multiples of {self.patch} for --imgsz",
            )


def _variants() -> Mapping[str, DeiTConfig]:
    sizes = {
        "tiny": DeiTConfig(),
        "small": DeiTConfig(width=384, heads=6, hidden=1536),
        "base": DeiTConfig(width=768, heads=12, hidden=3072),
    }
    distilled = {f"{name}-distilled": replace(config, distilled=True) for name, config in sizes.items()}
    return with_baselines({f"castling-deit-{name}": config for name, config in {**sizes, **distilled}.items()})


VARIANTS = _variants()
