"""Recognises, builds and resizes Castling-MViTv2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from castling_deploy.models.family import (
    Output,
    Size,
    Tensors,
    attention_of,
    count,
    logits,
    tensor,
)
from castling_deploy.models.mvit import CastlingMViTv2, MViTv2Backbone
from castling_deploy.models.mvit_config import PATCH_STRIDE, VARIANTS, MViTv2Config, place_of


class MViTv2Family:
    """Recognises, builds and resizes Castling-MViTv2."""

    name = "castling-mvitv2"
    baseline = "mvitv2"
    title = "Castling-MViTv2"
    task = "classification"
    preprocessing: Mapping[str, Any] = {}
    reference = "arXiv:2211.10526; MViTv2: arXiv:2112.01526"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return {"patch_embed.proj.weight", "stages.0.blocks.0.attn.pool_q.weight"} <= tensors.keys()

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> MViTv2Config:
        config = self.backbone_config_of(tensors, image_size, aux_threshold)
        return replace(config, classes=tensor(tensors, "head.fc.weight").shape[0])

    def backbone_config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> MViTv2Config:
        stages = range(count(tensors, "stages."))
        head_dim = tensor(tensors, "stages.0.blocks.0.attn.pool_q.weight").shape[0]
        widths = tuple(tensor(tensors, f"stages.{stage}.blocks.0.attn.proj.weight").shape[0] for stage in stages)
        attention, kernel = attention_of(tensors), MViTv2Config.kernel
        if attention == "castling":
            kernel = tensor(tensors, "stages.0.blocks.0.attn.dconv.weight").shape[2]
        positions = "stages.0.blocks.0.attn.rel_pos_h" in tensors
        if positions:  # 2 n - 1 relative positions for n tokens along an axis
            sides = (tensor(tensors, f"stages.0.blocks.0.attn.rel_pos_{axis}").shape[0] for axis in "hw")
            height, width = (PATCH_STRIDE * (side + 1) // 2 for side in sides)
            image_size = height, width
        return MViTv2Config(
            widths=widths,
            heads=tuple(width // head_dim for width in widths),
            depths=tuple(count(tensors, f"stages.{stage}.blocks.") for stage in stages),
            mlp_ratio=tensor(tensors, "stages.0.blocks.0.mlp.fc1.weight").shape[0] // widths[0],
            positions=positions,
            image_size=image_size or MViTv2Config.image_size,
            channels=tensor(tensors, "patch_embed.proj.weight").shape[1],
            kernel=kernel,
            aux_threshold=aux_threshold,
            attention=attention,
        )

    def outputs(self, config: MViTv2Config) -> tuple[Output, ...]:
        return logits(config.classes)

    def build(self, config: MViTv2Config) -> nn.Module:
        return CastlingMViTv2(config)

    def backbone(self, config: MViTv2Config) -> nn.Module:
        return MViTv2Backbone(config)

    def scales(self, config: MViTv2Config) -> tuple[tuple[int, ...], nn.Module | None]:
        return config.widths, None

    def resized(self, tensors: Tensors, config: MViTv2Config, image_size: Size) -> tuple[Tensors, MViTv2Config]:
        new = replace(config, image_size=image_size)
        changed = {}
        for name, table in tensors.items():  # (2 n - 1, D)
            if name.endswith((".rel_pos_h", ".rel_pos_w")):
                _, stage, _, block, *_ = name.split(".")
                side = place_of(new, int(stage), int(block)).table[name.endswith("w")]
                changed[name] = stretched(table, 2 * side - 1)
        return {**tensors, **changed}, new


def stretched(table: torch.Tensor, length: int) -> torch.Tensor:
    """(L, D) -> (length, D): linear interpolation, as facebookresearch/mvit's get_rel_pos."""
    return nn.functional.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T
