"""The networks of timm that `castlify` takes, known by the names of their classes: timm itself is not imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from castling_deploy.errors import UsageError
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.family import Size
from castling_deploy.models.levit_attention import Attention
from castling_deploy.models.levit_config import STEM_STRIDE, LeViTConfig
from castling_deploy.models.mvit_config import PATCH_STRIDE, MViTv2Config, place_of
from castling_deploy.models.timm_attention import MultiScaleVitAttention, VisionTransformerAttention
from castling_deploy.suggest import did_you_mean

BLOCK = re.compile(r"(?:stages\.(\d+)\.)?blocks\.(\d+)")


@dataclass(frozen=True)
class Setting:
    """An attribute of the network that no tensor tells, the value that our family has, and how timm gives it."""

    attribute: str
    value: object
    remedy: str


@dataclass(frozen=True)
class Kind:
    """A kind of network in timm: class names of its block, attention and activation, settings, and the image size.

    `attention_for` makes the new attention, from our configuration, the block's numbers (stage, block) and the old one.
    `image_size` is None where timm does not tell.
    """

    block: str
    attention: str
    activation: str
    settings: tuple[Setting, ...]
    image_size: Callable[[Any], Size | None]
    attention_for: Callable[[Any, tuple[int, int], Any], nn.Module]


def _deit_attention(config: DeiTConfig, place: tuple[int, int], old: Any) -> nn.Module:
    return VisionTransformerAttention(config, dropout=getattr(old.proj_drop, "p", 0.0))


def _levit_attention(config: LeViTConfig, place: tuple[int, int], old: Any) -> nn.Module:
    stage, _ = place
    return Attention(config.widths[stage], config.heads[stage], config, config.grids[stage])


def _mvit_attention(config: MViTv2Config, place: tuple[int, int], old: Any) -> nn.Module:
    return MultiScaleVitAttention(place_of(config, *place), config)


def _times(grid: Size | None, stride: int) -> Size | None:
    return None if grid is None else (grid[0] * stride, grid[1] * stride)


VIT = Kind(
    block="Block",
    attention="Attention",
    activation="GELU",
    settings=(
        Setting("global_pool", "token", "create it with global_pool='token'"),
        Setting("has_class_token", True, "create it with class_token=True"),
        Setting("no_embed_class", False, "create it with no_embed_class=False"),
        Setting("num_reg_tokens", 0, "create it with reg_tokens=0"),
    ),
    image_size=lambda model: model.patch_embed.img_size,
    attention_for=_deit_attention,
)
LEVIT = Kind(
    block="LevitBlock",
    attention="Attention",
    activation="Hardswish",
    settings=(
        Setting("global_pool", "avg", "create it with global_pool='avg'"),
        Setting("use_conv", False, "take the variant without _conv (levit_128s for levit_conv_128s)"),
    ),
    # timm 1.0.3 keeps no resolution
    image_size=lambda model: _times(getattr(model.stages[0].blocks[0].attn, "resolution", None), STEM_STRIDE),
    attention_for=_levit_attention,
)
MVIT = Kind(
    block="MultiScaleBlock",
    attention="MultiScaleAttention",
    activation="GELU",
    settings=(Setting("global_pool", "avg", "create it with global_pool='avg'"),),
    image_size=lambda model: _times(model.stages[0].feat_size, PATCH_STRIDE),
    attention_for=_mvit_attention,
)
KINDS: Mapping[str, Kind] = {
    "VisionTransformer": VIT,
    "VisionTransformerDistilled": VIT,
    "Levit": LEVIT,
    "LevitDistilled": LEVIT,
    "MultiScaleVit": MVIT,
}


def kind_of(model: nn.Module) -> Kind:
    """Raises UsageError for anything but timm's own classes, as our family builds them."""
    name, package = type(model).__name__, type(model).__module__.partition(".")[0]
    if package != "timm" or name not in KINDS:
        raise UsageError(
            f"castlify cannot take a {name}",
            hint=f"it takes networks of timm's own classes, not yet compiled or wrapped; {did_you_mean(name, KINDS)}",
        )
    kind = KINDS[name]
    for setting in kind.settings:
        value = getattr(model, setting.attribute, setting.value)  # older releases lack the younger ones
        if value != setting.value:
            raise UsageError(
                f"this {name} has {setting.attribute}={value!r}, which could not be exported", hint=setting.remedy
            )
    return kind


def attentions(model: nn.Module, kind: Kind) -> Iterator[tuple[str, nn.Module]]:
    """The attentions to replace, by name. Raises UsageError where a block has another one."""
    blocks = [(name, module) for name, module in model.named_modules() if BLOCK.fullmatch(name)]
    if not blocks:
        raise UsageError(f"this {type(model).__name__} has no blocks", hint="create it with a depth of one or more")
    for name, block in blocks:
        if type(block).__name__ != kind.block:
            raise UsageError(
                f"'{name}' is a {type(block).__name__}, castlify knows {kind.block}", hint="create it without block_fn"
            )
        attention = block.get_submodule("attn")
        if hasattr(attention, "dconv"):
            raise UsageError(f"'{name}.attn' is linear-angular attention already", hint="castlify a network once")
        if type(attention).__name__ != kind.attention:
            raise UsageError(
                f"'{name}.attn' is a {type(attention).__name__}, castlify replaces {kind.attention}",
                hint="create it without attn_layer or pool_first",
            )
        dropout = getattr(attention, "attn_drop", None)
        if dropout is not None and dropout.p > 0:
            raise UsageError(
                f"'{name}.attn' drops attention weights, which linear-angular attention never forms",
                hint="create it with attn_drop_rate=0",
            )
        if not getattr(attention, "residual_pooling", True):
            raise UsageError(f"'{name}.attn' does not add its queries", hint="create it with residual_pooling=True")
        yield f"{name}.attn", attention
