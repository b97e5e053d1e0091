"""Reading a checkpoint: a file becomes named tensors. Never runs code that a file brings along."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as numpy_scalar

from castling_deploy.errors import CheckpointError

# What trainers save beside tensors, and what is harmless to rebuild: timm's and facebook's `args`, metrics as numpy
# scalars. Everything else a pickle may name is refused by torch itself (weights_only).
HARMLESS: list[Any] = [
    argparse.Namespace,
    numpy_scalar,
    np.dtype,
    type(np.dtype("float64")),
    type(np.dtype("float32")),
    type(np.dtype("int64")),
]
# Where trainers put the weights, best first: an average of the weights is what its trainer evaluated.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model")
# Components that wrappers add to every name: DDP, torch.compile (also in the middle of a name).
WRAPPERS = ("module", "_orig_mod")
# Attributes that hold the network inside a training module, taken off only where all names have them.
ATTRIBUTES = ("model.", "net.", "backbone.", "encoder.")
# Bookkeeping that is no weight.
DROPPED_ENDINGS = ("num_batches_tracked", "attention_bias_idxs", "relative_position_index", "n_averaged")


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of a file (`sha256` None: not from one).

    `peeled` says which wrappers were taken off, `dropped` which entries are no weights, `card` what the file says of
    itself (unchecked, see card.py).
    """

    path: Path
    sha256: str | None
    tensors: Mapping[str, torch.Tensor]
    peeled: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    card: Any = field(default_factory=dict)


def read(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: safetensors, or a torch file read with `weights_only`. Raises CheckpointError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file '{path}'", hint="check the path of the checkpoint")
    if path.is_dir():
        raise CheckpointError(
            f"'{path}' is a folder, not a checkpoint file", hint="name the .safetensors or .pth file inside it"
        )
    try:
        digest = _sha256(path)
        content, card = _safetensors(path) if _is_safetensors(path) else (_torch_file(path), {})
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be read: {error.strerror}", hint="check the file's permissions"
        ) from None
    tensors, peeled = _unwrapped(content, path)
    kept = {name: value for name, value in tensors.items() if not _is_bookkeeping(name)}
    widened = {name: _as_float32(name, value, path) for name, value in kept.items()}
    half = {str(value.dtype).removeprefix("torch.") for value in kept.values() if value.dtype != torch.float32}
    if half:
        peeled.append(f"{' and '.join(sorted(half))} weights widened to float32")
    return Checkpoint(path, digest, widened, tuple(peeled), tuple(name for name in tensors if name not in kept), card)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and head[:2] != b"PK")


def _safetensors(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            card = json.loads(metadata.get("castling", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118  # not a dict
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"'{path}' is no complete safetensors file: {error}", hint="the file is damaged or cut short; copy it again"
        ) from None


def _torch_file(path: Path) -> Any:
    with open(path, "rb") as file:
        head = file.read(2)
    if head not in (b"PK", b"\x80\x02") and head[:1] != b"\x80":
        raise CheckpointError(
            f"'{path}' is no checkpoint: neither safetensors nor a torch file",
            hint="pass the file that the trainer saved (.safetensors, .pth, .pt, .ckpt)",
        )
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, KeyError, ... on damaged files
        offenders = _offenders(path, error)
        if offenders:
            raise CheckpointError(
                f"'{path}' wants to run code when it is read, and was not: {', '.join(offenders)}",
                hint="where you trust its maker, load it there and save model.state_dict() as safetensors",
            ) from None
        raise CheckpointError(
            f"'{path}' is no complete torch file: {str(error).splitlines()[0][:160]}",
            hint="the file is damaged or cut short; copy it again",
        ) from None


def _offenders(path: Path, error: Exception) -> list[str]:
    """Names that the pickle would import, found without running it; empty where it would import none."""
    named = re.findall(r"(?i)unsupported (?:global|class|operand)[: ]*([\w.]+)", str(error))
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or named
    except Exception:  # no zip archive, or one that is cut short: torch's first error has to do
        return named


def _unwrapped(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors inside the trainer's containers, with wrapper prefixes off, and what was taken off."""
    peeled: list[str] = []
    while isinstance(content, Mapping):
        inside = [key for key in CONTAINERS if isinstance(content.get(key), Mapping) and content[key]]
        if not inside:
            break
        content = content[inside[0]]
        peeled.append(f"container '{inside[0]}'")
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
                tensors = {
                    ".".join(part for part in name.split(".") if part != wrapper): value
                    for name, value in tensors.items()
                }
                peeled.append(f"prefix '{wrapper}.'")
        for attribute in ATTRIBUTES:
            weights = [name for name in tensors if not _is_bookkeeping(name)]
            if weights and all(name.startswith(attribute) for name in weights):
                tensors = {name.removeprefix(attribute): value for name, value in tensors.items()}
                peeled.append(f"prefix '{attribute}'")
    return tensors, peeled


def _is_bookkeeping(name: str) -> bool:
    return name.endswith(DROPPED_ENDINGS) or name.startswith("ema_")


def _as_float32(name: str, value: torch.Tensor, path: Path) -> torch.Tensor:
    if not value.is_floating_point():
        raise CheckpointError(
            f"tensor '{name}' in '{path}' is {str(value.dtype).removeprefix('torch.')}, not floating point",
            hint="export the checkpoint as it was before quantisation",
        )
    if not torch.isfinite(value).all():
        count = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"tensor '{name}' in '{path}' has {count} values that are NaN or infinite",
            hint="the training diverged, or the file is damaged; use an earlier checkpoint",
        )
    return value.detach().float().contiguous()
