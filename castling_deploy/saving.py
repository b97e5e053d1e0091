"""Writing a checkpoint: a network's tensors in a safetensors file, with what they do not tell in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from castling_deploy.errors import UsageError
from castling_deploy.identify import ModelCard
from castling_deploy.reading.card import Stated, stated
from castling_deploy.reading.containers import is_bookkeeping
from castling_deploy.suggest import did_you_mean


def write_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], *, overwrite: bool
) -> None:
    """The tensors and, as the `castling` entry of the metadata, the facts that are not None.

    The file is there whole or not at all. Raises UsageError where `path` is taken or cannot be written, CheckpointError
    where a fact cannot be true.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise UsageError(f"'{path}' is no name of a safetensors file", hint=f"use '{path.with_suffix('.safetensors')}'")
    if path.exists() and not overwrite:
        raise UsageError(f"'{path}' exists already", hint="pass overwrite=True to replace it, or choose another name")
    known = [field.name for field in fields(Stated)]
    for name in facts:
        if name not in known:
            raise UsageError(f"a checkpoint does not state its '{name}'", hint=did_you_mean(name, known))
    entry = json.dumps({name: value for name, value in facts.items() if value is not None})
    stated(json.loads(entry))
    kept = {name: value for name, value in tensors.items() if not is_bookkeeping(name, value)}
    weights = {name: value.detach().cpu().contiguous() for name, value in kept.items()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(weights, partial, metadata={"castling": entry})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write '{path}': {error}", hint="choose a folder that exists and has space") from None
    finally:
        partial.unlink(missing_ok=True)


def facts_of(card: ModelCard) -> dict[str, Any]:
    """What a network's tensors do not tell, in the words of card.py."""
    return {
        "name": card.name,
        "labels": card.labels,
        "samples": card.samples,
        "image_size": card.config.image_size,
        "aux_threshold": card.config.aux_threshold,
        "resize_kernel": card.preprocessing.resize_kernel,
        "crop_fraction": card.preprocessing.crop_fraction,
        "mean": card.preprocessing.mean,
        "std": card.preprocessing.std,
        "warnings": card.warnings or None,
    }
