"""Castling: the auxiliary masked-softmax branch, needed in training, is cast away for inference.

The cast is an approximation unless every mask is zero (You et al., CVPR 2023, arXiv:2211.10526, section 3.3), so it is
never silent: `measure_cast` records what is lost, layer by layer, on real inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from castling_deploy.rewrite import rebuilt
from castling_deploy.verbs import make_callable


@dataclass(frozen=True)
class CastEvidence:
    """What the auxiliary branch of one layer did on a batch, P being its masked softmax.

    `mask_density` is the share of P that is not masked, `peak` the largest softmax entry before masking (at or below
    the threshold the cast is exact for this batch). `contribution` is the root mean square of ||P v|| over tokens and
    heads against that of ||o||, `contribution_max` the largest single ||P v|| / ||o||, o being the output without P v,
    before its normalisation.
    """

    tokens: int
    threshold: float
    mask_density: float
    peak: float
    contribution: float
    contribution_max: float

    @property
    def can_vanish(self) -> bool:
        """Whether a mask can be all zero at all: some entry of a softmax row of N entries is at least 1/N."""
        return self.threshold * self.tokens >= 1


@dataclass(frozen=True)
class LayerCast:
    """The evidence of the layer at `path`."""

    path: str
    evidence: CastEvidence


@runtime_checkable
class Castleable(Protocol):
    """A module with a branch that only training needs."""

    def castled(self) -> nn.Module:
        """The inference twin; the module itself is not changed."""

    def cast_evidence(self, x: torch.Tensor) -> CastEvidence | None:
        """What the branch does on the input x (B, N, C); None when it has been cast away already."""


def castle(model: nn.Module) -> nn.Module:
    """A new network without auxiliary branches; `model` is not changed."""
    return rebuilt(model, lambda _, module: module.castled() if isinstance(module, Castleable) else module)


@torch.no_grad()
def measure_cast(model: nn.Module, images: torch.Tensor) -> tuple[LayerCast, ...]:
    """What the cast of every layer of `model` (training form, eval mode) would lose on images (B, C, H, W)."""
    with evidence_of(model) as layers:
        model(images)
    return tuple(layers.values())


@contextmanager
def evidence_of(model: nn.Module) -> Iterator[dict[str, LayerCast]]:
    """What the cast of every layer loses on the first batch that `model` is called with inside, by path."""
    found: dict[str, LayerCast] = {}

    def listener(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(module, Castleable)
            handles[path].remove()
            evidence = module.cast_evidence(inputs[0])
            if evidence is not None:
                found[path] = LayerCast(path, evidence)

        return model.get_submodule(path).register_forward_pre_hook(hook)

    handles = {path: listener(path) for path, module in model.named_modules() if isinstance(module, Castleable)}
    try:
        yield found
    finally:
        for handle in handles.values():
            handle.remove()


make_callable(__name__)
