"""Dense tasks: a backbone that gives maps at several scales, and a head that reads them.

Which backbone and which head make a family is data; what a head is, is its own file's (detector.py, segmenter.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

from torch import nn

from castling_deploy.errors import ShapeError
from castling_deploy.models.family import AttentionKind, Output, Size, Tensors

BACKBONE = "backbone."


class BackboneFamily(Protocol):
    """A family whose networks can do without their classifier. Configurations are as those of a ModelFamily."""

    title: str
    reference: str
    variants: Mapping[str, Any]

    def recognises(self, tensors: Tensors) -> bool:
        """Whether these tensors are a network of this family, with or without its classifier."""

    def backbone_config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> Any:
        """The hyper-parameters of a network without classifier; those of the classifier are the defaults."""

    def backbone(self, config: Any) -> nn.Module:
        """The network in training form, (B, C, H, W) -> maps (B, C', h, w), finest first."""

    def scales(self, config: Any) -> tuple[tuple[int, ...], nn.Module | None]:
        """The channels of those maps, and what makes maps of strides 4, 8, 16, 32 of them; None where they are."""

    def resized(self, tensors: Tensors, config: Any, image_size: Size) -> tuple[Tensors, Any]:
        """As that of a ModelFamily."""


class Head(Protocol):
    """The hyper-parameters of a head, a frozen dataclass; the class itself knows how to find them in tensors.

    `multiple`: what height and width of an image have to be multiples of, in pixels.
    """

    task: ClassVar[str]
    multiple: ClassVar[int]
    preprocessing: ClassVar[Mapping[str, Any]]
    reference: ClassVar[str]

    @staticmethod
    def recognises(tensors: Tensors) -> bool:
        """Whether there is such a head among these tensors."""

    @classmethod
    def of(cls, tensors: Tensors) -> tuple[Self, int]:
        """The hyper-parameters and the number of classes."""

    def parts(self, channels: tuple[int, ...], scaling: nn.Module | None, classes: int) -> Mapping[str, nn.Module]:
        """Modules for maps of these channels, each one's output the next one's input, by their state-dict names."""

    def outputs(self, classes: int, image_size: Size) -> tuple[Output, ...]:
        """What the last of them returns."""


@dataclass(frozen=True)
class DenseConfig:
    """Hyper-parameters of a backbone and a head."""

    backbone: Any
    head: Head
    classes: int

    @property
    def image_size(self) -> Size:
        size: Size = self.backbone.image_size
        return size

    @property
    def channels(self) -> int:
        channels: int = self.backbone.channels
        return channels

    @property
    def aux_threshold(self) -> float:
        threshold: float = self.backbone.aux_threshold
        return threshold

    @property
    def attention(self) -> AttentionKind:
        attention: AttentionKind = self.backbone.attention
        return attention

    def __post_init__(self) -> None:
        multiple = self.head.multiple
        if any(side <= 0 or side % multiple for side in self.image_size):
            height, width = self.image_size
            raise ShapeError(
                f"an image of {height} x {width} pixels does not fit the maps that {self.head.task} is made on",
                hint=f"use multiples of {multiple} for --imgsz",
            )


@dataclass(frozen=True)
class DenseFamily:
    """A ModelFamily of one backbone and one head."""

    name: str
    baseline: str | None
    title: str
    trunk: BackboneFamily
    head: type[Head]
    variants: Mapping[str, DenseConfig]

    @property
    def task(self) -> str:
        return self.head.task

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        return self.head.preprocessing

    @property
    def reference(self) -> str:
        return f"{self.trunk.reference}; {self.head.reference}"

    def recognises(self, tensors: Tensors) -> bool:
        return self.head.recognises(tensors) and self.trunk.recognises(_inner(tensors))

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> DenseConfig:
        head, classes = self.head.of(tensors)
        inner = _inner(tensors)
        backbone = self.trunk.backbone_config_of(inner, image_size, aux_threshold)
        if image_size is None:  # where the tensors do not tell: that of the published network of these widths
            alike = (
                variant.image_size
                for variant in self.variants.values()
                if replace(variant.backbone, image_size=backbone.image_size, aux_threshold=aux_threshold) == backbone
            )
            backbone = self.trunk.backbone_config_of(inner, next(alike, None), aux_threshold)
        return DenseConfig(backbone, head, classes)

    def build(self, config: DenseConfig) -> nn.Module:
        channels, scaling = self.trunk.scales(config.backbone)
        parts = {
            BACKBONE.rstrip("."): self.trunk.backbone(config.backbone),
            **config.head.parts(channels, scaling, config.classes),
        }
        network = nn.Sequential(OrderedDict(parts))
        network.config = config  # type: ignore[assignment]  # no tensor or module
        return network

    def outputs(self, config: DenseConfig) -> tuple[Output, ...]:
        return config.head.outputs(config.classes, config.image_size)

    def resized(self, tensors: Tensors, config: DenseConfig, image_size: Size) -> tuple[Tensors, DenseConfig]:
        inner, backbone = self.trunk.resized(_inner(tensors), config.backbone, image_size)
        outer = {name: value for name, value in tensors.items() if not name.startswith(BACKBONE)}
        return {**outer, **{BACKBONE + name: value for name, value in inner.items()}}, replace(
            config, backbone=backbone
        )


def _inner(tensors: Tensors) -> Tensors:
    """The backbone's tensors by the names that they have without a head."""
    return {name.removeprefix(BACKBONE): value for name, value in tensors.items() if name.startswith(BACKBONE)}
