"""PicoHead, the dense head of PicoDet (arXiv:2111.00902; PaddleDetection pico_head.py, GFL of arXiv:2006.04388).

State-dict names are those of the mmdet port (Bo396543018/Picodet_Pytorch picodet_head.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from castling_deploy.models.csp_pan import KERNEL
from castling_deploy.models.layers import SeparableConv
from castling_deploy.rewrite import copied

STRIDES = (8, 16, 32, 64)
PRIOR = 0.01  # the probability of an object that an untrained head gives every class everywhere (arXiv:1708.02002)


def output_names(strides: Sequence[int] = STRIDES) -> tuple[str, ...]:
    """Names of what the head returns, in its order: the scores of every level, then the distances of every level."""
    return *(f"cls_pred_stride_{stride}" for stride in strides), *(f"dis_pred_stride_{stride}" for stride in strides)


class Integral(nn.Module):
    """The mean of a box side's distribution over 0..reg_max, in strides: (..., 4 * (reg_max + 1)) -> (..., 4).

    Sides are left, top, right, bottom. Training and the decoder need it, the exported network does not.
    """

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.project = nn.Buffer(torch.arange(reg_max + 1.0))

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        return distances.unflatten(-1, (4, -1)).softmax(-1) @ self.project


class PicoHead(nn.Module):
    """Per level, weights of its own: separable convolutions, then one 1x1 for classes and box sides.

    Shape: maps (B, C, h, w), one per level -> first of every level the scores (B, h * w, classes) in 0..1, then of
    every level the logits of the box sides (B, h * w, 4 * (reg_max + 1)), sides slowest. `output_names` names them,
    castling_deploy.detection makes boxes of them.
    """

    fold_rule: ClassVar[str] = "box integral left to the decoder"

    def __init__(self, classes: int, channels: int, convs: int, reg_max: int = 7, levels: int = len(STRIDES)) -> None:
        super().__init__()
        self.classes = classes
        self.cls_convs = nn.ModuleList(
            nn.Sequential(*(SeparableConv(channels, KERNEL) for _ in range(convs))) for _ in range(levels)
        )
        self.gfl_cls = nn.ModuleList(nn.Conv2d(channels, classes + 4 * (reg_max + 1), 1) for _ in range(levels))
        self.integral: Integral | None = Integral(reg_max)
        for conv in self.gfl_cls:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
            nn.init.constant_(conv.bias[:classes], math.log(PRIOR / (1 - PRIOR)))

    def logits(self, features: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What `forward` returns before the sigmoid, scores and distances apart: what a training loss needs."""
        tokens = [
            last(convs(x)).flatten(2).transpose(1, 2)  # (B, h * w, classes + 4 * (reg_max + 1))
            for convs, last, x in zip(self.cls_convs, self.gfl_cls, features, strict=True)
        ]
        return tuple(x[..., : self.classes] for x in tokens), tuple(x[..., self.classes :] for x in tokens)

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        scores, distances = self.logits(features)
        return *(x.sigmoid() for x in scores), *distances

    def folded(self) -> nn.Module:
        twin = copied(self)
        assert isinstance(twin, PicoHead)
        twin.integral = None
        return twin
