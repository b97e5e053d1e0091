"""What an exporter is handed: the small networks, castled and folded, with their interface."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from networks import SMALL, small
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.fold import fold
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.target import Network, TensorSpec


def folded_network(name: str, batch: int = 1) -> Network:
    return network_of(fold(castle(small(name))), SMALL[name][1].image_size, batch, name)


def network_of(module: nn.Module, size: tuple[int, int], batch: int = 1, name: str = "test") -> Network:
    return Network(
        name,
        module,
        (TensorSpec("image", (batch, 3, *size), "float32", "NCHW"),),
        (TensorSpec("logits", (batch, 10), "float32", "NC"),),
        Preprocessing(size),
        None,
        description=f"a small {name}",
        metadata={"model": name, "checkpoint_sha256": "0" * 64},
    )


def images_for(network: Network, count: int) -> npt.NDArray[np.float32]:
    shape = (count, *network.inputs[0].shape[1:])
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def logits_of(network: Network, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What PyTorch says, in float32."""
    with torch.no_grad():
        return network.module(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]
