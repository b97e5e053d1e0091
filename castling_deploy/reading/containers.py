"""What trainers and wrappers put around a network's tensors, taken off and reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
# Bookkeeping that is no weight, and what nothing uses.
DROPPED_ENDINGS = (
    "num_batches_tracked",
    "attention_bias_idxs",
    "relative_position_index",
    "n_averaged",
    "_feat.scale_reg",  # Paddle's PicoHead inherits it from its GFL head, and does without
)
PLAIN_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Unwrapped:
    """Tensors without what was around them, and what was taken off; `prefix` is what the asked ones' names begin with,
    where they were asked for by that."""

    tensors: Mapping[str, torch.Tensor]
    peeled: tuple[str, ...]
    prefix: str | None = None


def unwrapped(content: Any, path: Path, weights: str | None = None) -> Unwrapped:
    """The tensors inside the trainer's containers, with wrapper prefixes off.

    `weights` names a container, which is taken rather than the preferred one, or else a prefix. Raises CheckpointError,
    which names `path`, where there are no tensors or no such weights.
    """
    peeled: list[str] = []
    known = _containers_in(content)
    sought = weights
    while isinstance(content, Mapping):
        inside = [key for key in CONTAINERS if _is_filled(content.get(key))]
        if _is_filled(content.get(sought)):
            others = [key for key in inside if key != sought]
            peeled.append(f"container '{sought}', asked for" + (f" rather than '{others[0]}'" if others else ""))
            content, sought = content[sought], None
        elif inside:
            preferred = f", preferred to '{inside[1]}'" if len(inside) > 1 else ""
            peeled.append(f"container '{inside[0]}'{preferred}")
            content = content[inside[0]]
        else:
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}, not a network's tensors",
            hint="save model.state_dict(), not the model or something else",
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors and not known:
        raise CheckpointError(f"'{path}' holds no tensors", hint=f"looked at the top and in: {', '.join(CONTAINERS)}")
    tensors = _without_wrappers(tensors, path, peeled)
    if not tensors or (sought is not None and not any(name.startswith(f"{sought}.") for name in tensors)):
        prefixes = list(dict.fromkeys(name.split(".")[0] for name in tensors if "." in name))
        raise CheckpointError(
            f"'{path}' has no weights '{sought}'" if sought else f"'{path}' holds tensors in places of its own",
            hint=f"{'leave --weights out, or ' if tensors else ''}name one with --weights: "
            f"{', '.join([*known, *prefixes])}",
        )
    return Unwrapped(tensors, tuple(peeled), sought and f"{sought}.")


def _is_filled(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content)


def _containers_in(content: Any) -> list[str]:
    """The entries of a file that hold tensors."""
    entries = content.items() if isinstance(content, Mapping) else ()
    return [
        str(key)
        for key, inner in entries
        if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values())
    ]


def _without_wrappers(tensors: dict[str, torch.Tensor], path: Path, peeled: list[str]) -> dict[str, torch.Tensor]:
    """The tensors without wrappers' components and attributes that all share, which are noted in `peeled`."""
    before = None
    while before != tensors.keys():
        before = tensors.keys()
        for wrapper in WRAPPERS:
            if any(wrapper in name.split(".") for name in tensors):
                tensors = _without(wrapper, tensors, path)
                peeled.append(f"prefix '{wrapper}.'")
        for attribute in ATTRIBUTES:
            weights = [name for name, value in tensors.items() if not is_bookkeeping(name, value)]
            if weights and all(name.startswith(attribute) for name in weights):
                tensors = {name.removeprefix(attribute): value for name, value in tensors.items()}
                peeled.append(f"prefix '{attribute}'")
    return tensors


def is_bookkeeping(name: str, value: torch.Tensor) -> bool:
    """Whether the entry counts, indexes or averages, and is no weight of the network: a trainer's step, too, and the
    best score so far, which starts as infinity."""
    averaged = name.startswith("ema_") and "." not in name  # PicoDet's port: buffers beside the network's own names
    counts = value.dtype in (torch.int64, torch.int32, torch.bool)
    number = value.ndim == 0 and value.is_cpu and value.layout is torch.strided and value.dtype in PLAIN_FLOATS
    unset = number and not value.isfinite()
    return averaged or counts or bool(unset) or name.endswith(DROPPED_ENDINGS)


def _without(component: str, tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    short = {name: ".".join(part for part in name.split(".") if part != component) for name in tensors}
    if len(set(short.values())) < len(short):
        twice = next(name for name in short.values() if list(short.values()).count(name) > 1)
        raise CheckpointError(
            f"'{path}' holds two tensors '{twice}', with and without the prefix '{component}.'",
            hint="save one network's state_dict() alone",
        )
    return {short[name]: value for name, value in tensors.items()}
