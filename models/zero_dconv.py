"""A softmax network's tensors with token convolutions of zeros: for experiments, it was never trained like this."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from castling_deploy.errors import CheckpointError

KERNEL = 9  # taps, in GATECH-EIC/Castling-ViT attention.py
DEIT_HEAD_DIM = 64  # of every published DeiT

QKV = re.compile(r"^(.*\battn\.)qkv\.(?:linear\.)?weight$")


def with_zero_dconv(tensors: Mapping[str, torch.Tensor], heads: int | None = None) -> Mapping[str, torch.Tensor]:
    """The tensors, and a zero `dconv.weight` (H, 1, K, 1) for every attention that has none.

    H is the number of LeViT's bias tables, or the width over the head dimension: MViTv2's poolings have it as their
    channels, DeiT's is 64. `heads` overrides the last. Raises CheckpointError where H is no integer.
    """
    found = dict(tensors)
    for name, weight in tensors.items():
        if (qkv := QKV.match(name)) and f"{qkv[1]}dconv.weight" not in tensors:
            found[f"{qkv[1]}dconv.weight"] = weight.new_zeros(_heads(tensors, qkv[1], weight, heads), 1, KERNEL, 1)
    return found


def _heads(tensors: Mapping[str, torch.Tensor], place: str, qkv: torch.Tensor, heads: int | None) -> int:
    if f"{place}attention_biases" in tensors:
        return tensors[f"{place}attention_biases"].shape[0]
    width = qkv.shape[0] // 3
    if f"{place}pool_q.weight" in tensors:
        head_dim = tensors[f"{place}pool_q.weight"].shape[0]
    elif heads is not None:
        return heads
    else:
        head_dim = DEIT_HEAD_DIM
    if width % head_dim:
        raise CheckpointError(
            f"the {width} channels of '{place}qkv' do not tell the number of heads, of {head_dim} channels each",
            hint="state 'heads' in the file's metadata",
        )
    return width // head_dim
