"""What trainers and wrappers put around a network's tensors, taken off and reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from castling_deploy.errors import CheckpointError

# Where trainers put the weights, best first: an average of the weights is what its trainer evaluated. (mmengine and
# Lightning put the average itself under `state_dict`, and what it was made of elsewhere.)
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model")
# Components that wrappers add, also in the middle of a name: DDP, torch.compile.
WRAPPERS = ("module", "_orig_mod")
# Attributes that hold the network inside a training module, taken off only where all names have them.
ATTRIBUTES = ("model.", "net.", "backbone.", "encoder.")
# Bookkeeping that is no weight.
DROPPED_ENDINGS = ("num_batches_tracked", "attention_bias_idxs", "relative_position_index", "n_averaged")


def unwrapped(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors inside the trainer's containers, with wrapper prefixes off, and what was taken off.

    Raises CheckpointError, which names `path`, where there are no tensors.
    """
    peeled: list[str] = []
    while isinstance(content, Mapping):
        inside = [key for key in CONTAINERS if isinstance(content.get(key), Mapping) and content[key]]
        if not inside:
            break
        content = content[inside[0]]
        preferred = f", preferred to '{inside[1]}'" if len(inside) > 1 else ""
        peeled.append(f"container '{inside[0]}'{preferred}")
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}, not a network's tensors",
            hint="save model.state_dict(), not the model or something else",
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"'{path}' holds no tensors", hint=f"looked at the top and in: {', '.join(CONTAINERS)}")
    before = None
    while before != tensors.keys():
        before = tensors.keys()
        for wrapper in WRAPPERS:
            if any(wrapper in name.split(".") for name in tensors):
                tensors = _without(wrapper, tensors, path)
                peeled.append(f"prefix '{wrapper}.'")
        for attribute in ATTRIBUTES:
            weights = [name for name in tensors if not is_bookkeeping(name)]
            if weights and all(name.startswith(attribute) for name in weights):
                tensors = {name.removeprefix(attribute): value for name, value in tensors.items()}
                peeled.append(f"prefix '{attribute}'")
    return tensors, peeled


def is_bookkeeping(name: str) -> bool:
    """Whether the entry counts, indexes or averages, and is no weight of the network."""
    averaged = name.startswith("ema_") and "." not in name  # PicoDet's port: buffers beside the network's own names
    return averaged or name.endswith(DROPPED_ENDINGS)


def _without(component: str, tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    short = {name: ".".join(part for part in name.split(".") if part != component) for name in tensors}
    if len(set(short.values())) < len(short):
        twice = next(name for name in short.values() if list(short.values()).count(name) > 1)
        raise CheckpointError(
            f"'{path}' holds two tensors '{twice}', with and without the prefix '{component}.'",
            hint="save one network's state_dict() alone",
        )
    return {short[name]: value for name, value in tensors.items()}
