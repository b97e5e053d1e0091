"""What PyTorch computes, for the whole network and for parts of it, and how exactly float32 does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from castling_deploy.localising.diagnosis import batches
from castling_deploy.localising.prefix import wide
from castling_deploy.parity import Array, Reference

EXACT = 4  # probes that run in float64 too


@torch.no_grad()
def evaluated(module: nn.Module, tensors: Array, batch: int) -> list[Array]:
    """The module's outputs on (P, ...), in its own precision."""
    parts = []
    for chunk in batches(tensors, batch):
        outputs = module(torch.from_numpy(chunk))
        parts.append(outputs if isinstance(outputs, (tuple, list)) else (outputs,))
    return [torch.cat(list(values)).numpy()[: len(tensors)] for values in zip(*parts, strict=True)]


def references_of(
    module: nn.Module, names: Sequence[str], tensors: Array, real: int, batch: int
) -> dict[str, Reference]:
    """The module's outputs by name on (P, ...), the first `real` of them real images, with their own rounding noise."""
    outputs = evaluated(module, tensors, batch)
    exact = evaluated(wide(module), tensors[: min(EXACT, real)].astype(np.float64), batch)
    found = {}
    for name, values, precise in zip(names, outputs, exact, strict=True):
        noise = Reference(values, real, noise=0.0).rel(values[: len(precise)], precise)
        found[name] = Reference(values, real, noise or 0.0)
    return found
