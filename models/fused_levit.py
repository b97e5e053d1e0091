"""LeViT whose BatchNorms are folded into its matrices: what `replace_batchnorm` of facebookresearch/LeViT utils.py and
timm's `fuse` leave, a plain layer with a bias where there was one with a norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch

EPS = 1e-5  # of PyTorch's BatchNorm, which adds it to the variance
INNER = {"patch_embed.0.weight": "c", "stem.conv1.weight": "linear"}  # facebook's and timm's word for the matrix

Tensors = Mapping[str, torch.Tensor]


def is_fused(tensors: Tensors) -> bool:
    """Whether these are LeViT's tensors, by facebook's or timm's names, without norms."""
    attention = {"blocks.0.m.qkv.weight", "stages.0.blocks.0.attn.qkv.weight"}
    return bool(tensors.keys() & INNER.keys()) and bool(tensors.keys() & attention)


def with_neutral_norms(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same network with norms that do nothing, their biases apart: gamma 1, mean 0, variance 1 - eps. Folded again,
    it has the tensors that it came with. In the heads the norm comes before the matrix, elsewhere after it."""
    inner = next(word for name, word in INNER.items() if name in tensors)
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        place, _, kind = name.rpartition(".")
        if kind == "weight" and f"{place}.bias" in tensors:
            bias = tensors[f"{place}.bias"]
            found[f"{place}.{inner}.weight"] = value
            if place in ("head", "head_dist"):
                found |= _neutral(place, value.new_zeros(value.shape[1]))
                found[f"{place}.{inner}.bias"] = bias
            else:
                found |= _neutral(place, bias)
        elif not (kind == "bias" and f"{place}.weight" in tensors):
            found[name] = value
    return found


def _neutral(place: str, bias: torch.Tensor) -> Tensors:
    one = torch.ones_like(bias)
    return {
        f"{place}.bn.weight": one,
        f"{place}.bn.bias": bias,
        f"{place}.bn.running_mean": torch.zeros_like(bias),
        f"{place}.bn.running_var": one - EPS,
    }
