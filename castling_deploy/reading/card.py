"""What a checkpoint says of itself, checked before use: the `castling` entry of a safetensors file's metadata, or what
a hub folder's config.json says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from castling_deploy.errors import CheckpointError, UsageError

KERNELS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Stated:
    """Facts that shapes do not tell (`classes` they do: it has to agree); None where the file says nothing.

    `architecture` is a hub's word for the network, used as a name where there is no better one; `heads` counts only
    for a network whose tensors do not tell (softmax DeiT); `layer_norm_eps` is compared with the family's;
    `warnings` are those that the network had when it was saved.
    """

    name: str | None = None
    architecture: str | None = None
    classes: int | None = None
    heads: int | None = None
    layer_norm_eps: float | None = None
    labels: tuple[str, ...] | None = None
    samples: str | None = None
    image_size: tuple[int, int] | None = None
    aux_threshold: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize_kernel: str | None = None
    crop_fraction: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """What the user says of a checkpoint, and is taken rather than what its file says; None where nothing is said.

    `weights` names a container or a prefix (None: an average is preferred), `aux_threshold` masks the auxiliary branch,
    `mean` and `std` normalise the images, one number per channel for values in 0..1. Raises UsageError.
    """

    weights: str | None = None
    aux_threshold: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.aux_threshold is not None and not 0 <= self.aux_threshold <= 1:
            raise UsageError(f"an auxiliary threshold of {self.aux_threshold}", hint="softmax weights lie in 0..1")
        if not all(math.isfinite(value) for value in (*(self.mean or ()), *(self.std or ()))):
            raise UsageError("a mean or standard deviation is no number", hint="give one number per channel")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise UsageError(f"standard deviations of {self.std}", hint="images are divided by them: use more than 0")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Told:
        """What a manifest holds of it."""
        said: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
        }
        return cls(**said)


# What is assumed of a checkpoint that does not say it, where nobody else does.
ASSUMED = ("aux_threshold", "mean", "std")


def stated(entry: Any) -> Stated:
    """The checked entry. Raises CheckpointError on the first fact that cannot be true."""
    if not isinstance(entry, Mapping):
        raise _damaged("it is no object")
    checks: dict[str, Callable[[Any], bool]] = {
        "name": lambda value: isinstance(value, str) and NAME.fullmatch(value) is not None,
        "architecture": lambda value: isinstance(value, str) and NAME.fullmatch(value) is not None,
        "classes": lambda value: isinstance(value, int) and value > 0,
        "heads": lambda value: isinstance(value, int) and value > 0,
        "layer_norm_eps": lambda value: _number(value) and value > 0,
        "labels": lambda value: isinstance(value, list) and all(isinstance(label, (str, int)) for label in value),
        "samples": lambda value: isinstance(value, str),
        "image_size": lambda value: _numbers(value, 2) and all(isinstance(side, int) and side > 0 for side in value),
        "aux_threshold": lambda value: _number(value) and 0 <= value <= 1,
        "mean": lambda value: _numbers(value),
        "std": lambda value: _numbers(value) and all(item > 0 for item in value),
        "resize_kernel": lambda value: value in KERNELS,
        "crop_fraction": lambda value: _number(value) and 0.1 <= value <= 1,
        "warnings": lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
    }
    facts: dict[str, Any] = {}
    for key, check in checks.items():
        value = entry.get(key)
        if value is None:
            continue
        if not check(value):
            raise _damaged(f"'{key}' is {str(value)[:60]!r}")
        facts[key] = tuple(value) if isinstance(value, list) else value
    if "labels" in facts:
        facts["labels"] = tuple(str(label) for label in facts["labels"])
    return Stated(**facts)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any, count: int | None = None) -> bool:
    return isinstance(value, list) and all(map(_number, value)) and (len(value) == count if count else len(value) > 0)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"what the checkpoint says of itself cannot be used: {what}",
        hint="mend its metadata or config.json, or save the tensors without",
    )
