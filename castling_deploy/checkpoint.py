"""Reading a checkpoint: a file or a folder becomes named tensors. Never runs code that a file brings along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from castling_deploy.errors import CheckpointError
from castling_deploy.reading.containers import is_bookkeeping, unwrapped
from castling_deploy.reading.hub_folder import Folder, listed
from castling_deploy.reading.torch_file import read_torch_file


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of a file or folder (`sha256` None: of neither), in float32; a NaN may be among them.

    `peeled` says which wrappers were taken off, `dropped` which entries are no weights, `card` what the file says of
    itself (unchecked, see card.py), `prefix` under which names the network is, where the user said so. The `sha256` of
    a folder with one weight file is that file's; of several it is the one of the lines that `sha256sum` prints for
    them, in the order of their names.
    """

    path: Path
    sha256: str | None
    tensors: Mapping[str, torch.Tensor]
    peeled: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    card: Any = field(default_factory=dict)
    prefix: str | None = None


def read(path: str | Path, weights: str | None = None) -> Checkpoint:
    """The checkpoint at `path`: safetensors, a torch file (read with `weights_only`), or a hub folder of either.

    `weights` names one container or prefix of several, see containers.py. Raises CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file '{path}'", hint="check the path of the checkpoint")
    try:
        folder = listed(path) if path.is_dir() else Folder((path,), None, {})
        digests = [_sha256(file) for file in folder.files]
        contents = [_content(file) for file in folder.files]
    except OSError as error:
        raise CheckpointError(
            f"'{error.filename or path}' cannot be read: {error.strerror}", hint="check the file's permissions"
        ) from None
    inner = unwrapped(folder.merged([content for content, _ in contents]), path, weights)
    tensors, peeled, card = inner.tensors, list(inner.peeled), contents[0][1]
    kept = {name: value for name, value in tensors.items() if not is_bookkeeping(name, value)}
    widened = {name: _as_float32(name, value, path) for name, value in kept.items()}
    half = {str(value.dtype).removeprefix("torch.") for value in kept.values() if value.dtype != torch.float32}
    if half:
        peeled.append(f"{' and '.join(sorted(half))} weights widened to float32")
    return Checkpoint(
        path=path,
        sha256=digests[0] if len(digests) == 1 else _sha256_of_all(folder.files, digests),
        tensors=widened,
        peeled=tuple(peeled),
        dropped=tuple(name for name in tensors if name not in kept),
        card={**folder.card, **card} if isinstance(card, Mapping) else card,
        prefix=inner.prefix,
    )


def _content(path: Path) -> tuple[Any, Any]:
    """What the file holds, and what it says of itself."""
    return _safetensors(path) if _is_safetensors(path) else (read_torch_file(path), {})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_all(files: tuple[Path, ...], digests: list[str]) -> str:
    lines = "".join(f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and head[:2] != b"PK")


def _safetensors(path: Path) -> tuple[dict[str, Any], Any]:
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


def _as_float32(name: str, value: torch.Tensor, path: Path) -> torch.Tensor:
    if not value.is_floating_point():
        raise CheckpointError(
            f"tensor '{name}' in '{path}' is {str(value.dtype).removeprefix('torch.')}, not floating point",
            hint="export the checkpoint as it was before quantisation",
        )
    with suppress(NotImplementedError, RuntimeError):  # float4 cannot be converted
        if value.layout is torch.strided and not (value.is_meta or value.is_nested):
            return value.detach().float().contiguous()
    raise CheckpointError(
        f"tensor '{name}' in '{path}' is a {value.layout} {value.dtype} on {value.device} that cannot be read",
        hint="save dense tensors on the CPU: model.cpu().state_dict()",
    )


def require_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises CheckpointError for a weight that is NaN or infinite. What lies beside a network may well be: the best
    score so far of a trainer, a metric of no images."""
    for name, value in tensors.items():
        finite = torch.isfinite(value)
        if not finite.all():
            raise CheckpointError(
                f"tensor '{name}' in '{path}' has {int((~finite).sum())} values that are NaN or infinite",
                hint="the training diverged, or the file is damaged; use an earlier checkpoint",
            )
