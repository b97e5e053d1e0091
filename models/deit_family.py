"""Recognises, builds and resizes Castling-DeiT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from castling_deploy.errors import CheckpointError
from castling_deploy.models.deit import SEEN, CastlingDeiT, DeiTBackbone
from castling_deploy.models.deit_config import VARIANTS, DeiTConfig
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
from castling_deploy.models.semantic_fpn import FeaturePyramid

HEAD_DIM = 64  # of every published DeiT; the tensors of a softmax network do not tell


class DeiTFamily:
    """Recognises, builds and resizes Castling-DeiT."""

    name = "castling-deit"
    baseline = "deit"
    title = "Castling-DeiT"
    task = "classification"
    preprocessing: Mapping[str, Any] = {}
    reference = "arXiv:2211.10526; DeiT: arXiv:2012.12877"
    variants = VARIANTS

    def recognises(self, tensors: Tensors) -> bool:
        return {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= tensors.keys()

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> DeiTConfig:
        config = self.backbone_config_of(tensors, image_size, aux_threshold)
        return replace(config, classes=tensor(tensors, "head.weight").shape[0])

    def backbone_config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> DeiTConfig:
        width, channels, patch, patch_width = tensor(tensors, "patch_embed.proj.weight").shape
        attention = attention_of(tensors)
        heads, kernel = width // HEAD_DIM, DeiTConfig.kernel
        if attention == "castling":
            heads, _, kernel, _ = tensor(tensors, "blocks.0.attn.dconv.weight").shape
        elif width % HEAD_DIM:
            raise CheckpointError(
                f"{width} channels do not tell the number of heads of a softmax network",
                hint=f"DeiT's heads have {HEAD_DIM} channels",
            )
        distilled = "dist_token" in tensors
        patches = tensor(tensors, "pos_embed").shape[1] - (2 if distilled else 1)
        if patch != patch_width:
            raise CheckpointError(f"patches of {patch} x {patch_width} pixels are not square", hint="DeiT's are")
        return DeiTConfig(
            width=width,
            heads=heads,
            depth=count(tensors, "blocks."),
            hidden=tensor(tensors, "blocks.0.mlp.fc1.weight").shape[0],
            distilled=distilled,
            image_size=native_size(patches, patch, image_size),
            patch=patch,
            channels=channels,
            qkv_bias="blocks.0.attn.qkv.bias" in tensors,
            kernel=kernel,
            aux_threshold=aux_threshold,
            attention=attention,
        )

    def outputs(self, config: DeiTConfig) -> tuple[Output, ...]:
        return logits(config.classes)

    def build(self, config: DeiTConfig) -> nn.Module:
        return CastlingDeiT(config)

    def backbone(self, config: DeiTConfig) -> nn.Module:
        return DeiTBackbone(config)

    def scales(self, config: DeiTConfig) -> tuple[tuple[int, ...], nn.Module | None]:
        return SEEN * (config.width,), FeaturePyramid(config.width)

    def resized(self, tensors: Tensors, config: DeiTConfig, image_size: Size) -> tuple[Tensors, DeiTConfig]:
        new = replace(config, image_size=image_size)
        prefix, grid = tensors["pos_embed"].split([config.prefix, math.prod(config.grid)], dim=1)
        grid = grid.transpose(1, 2).unflatten(2, config.grid)  # (1, C, h, w)
        grid = interpolated(grid, new.grid).flatten(2).transpose(1, 2)
        return {**tensors, "pos_embed": torch.cat([prefix, grid], dim=1)}, new
