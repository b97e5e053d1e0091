"""Recognises, builds and resizes Castling-LeViT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from castling_deploy.models.family import (
    Output,
    Size,
    Tensors,
    attention_of,
    count,
    interpolated,
    logits,
    native_size,
    tensor,
)
from castling_deploy.models.levit import CastlingLeViT, LeViTBackbone, stem_widths
from castling_deploy.models.levit_config import STEM_STRIDE, VARIANTS, LeViTConfig


class LeViTFamily:
    """Recognises, builds and resizes Castling-LeViT."""

    name = "castling-levit"
    baseline = "levit"
    title = "Castling-LeViT"
    task = "classification"
    preprocessing: Mapping[str, Any] = {}
    reference = "arXiv:2211.10526; LeViT: arXiv:2104.01136"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return {"stem.conv1.linear.weight", "stages.0.blocks.0.attn.qkv.linear.weight"} <= tensors.keys()

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> LeViTConfig:
        config = self.backbone_config_of(tensors, image_size, aux_threshold)
        distilled = "head_dist.linear.weight" in tensors
        return replace(config, distilled=distilled, classes=tensor(tensors, "head.linear.weight").shape[0])

    def backbone_config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> LeViTConfig:
        stages = range(count(tensors, "stages."))
        biases = [tensor(tensors, f"stages.{stage}.blocks.0.attn.attention_biases") for stage in stages]  # (H, h * w)
        heads = tuple(table.shape[0] for table in biases)
        attention, kernel = attention_of(tensors), LeViTConfig.kernel
        if attention == "castling":
            kernel = tensor(tensors, "stages.0.blocks.0.attn.dconv.weight").shape[2]
        qkv = tensor(tensors, "stages.0.blocks.0.attn.qkv.linear.weight")  # (4 H D, C)
        return LeViTConfig(
            widths=tuple(
                tensor(tensors, f"stages.{stage}.blocks.0.attn.qkv.linear.weight").shape[1] for stage in stages
            ),
            heads=heads,
            depths=tuple(count(tensors, f"stages.{stage}.blocks.") for stage in stages),
            key_dim=qkv.shape[0] // (4 * heads[0]),
            distilled=False,
            image_size=native_size(biases[0].shape[1], STEM_STRIDE, image_size),
            channels=tensor(tensors, "stem.conv1.linear.weight").shape[1],
            kernel=kernel,
            aux_threshold=aux_threshold,
            attention=attention,
            down="linear" if "stages.1.downsample.attn_downsample.dconv.weight" in tensors else "softmax",
        )

    def outputs(self, config: LeViTConfig) -> tuple[Output, ...]:
        return logits(config.classes)

    def build(self, config: LeViTConfig) -> nn.Module:
        return CastlingLeViT(config)

    def backbone(self, config: LeViTConfig) -> nn.Module:
        return LeViTBackbone(config)

    def scales(self, config: LeViTConfig) -> tuple[tuple[int, ...], nn.Module | None]:
        return (*stem_widths(config)[1:3], *config.widths), None

    def resized(self, tensors: Tensors, config: LeViTConfig, image_size: Size) -> tuple[Tensors, LeViTConfig]:
        new = replace(config, image_size=image_size)
        changed = {}
        for name, table in tensors.items():  # (H, h * w)
            if name.endswith(".attention_biases"):
                stage = int(name.split(".")[1]) - (".downsample." in name)
                grid = table.unflatten(1, config.grids[stage])[None]
                changed[name] = interpolated(grid, new.grids[stage])[0].flatten(1)
        return {**tensors, **changed}, new
