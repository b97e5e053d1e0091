"""What a model family promises, and the list of families.

A family is one file: a frozen dataclass of hyper-parameters, the network, and a class with the members of
`ModelFamily`. A checkpoint's family and hyper-parameters are read off the names and shapes of its tensors.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import nn

from castling_deploy.errors import CheckpointError, UsageError
from castling_deploy.suggest import did_you_mean

Tensors = Mapping[str, torch.Tensor]
Size = tuple[int, int]
# "softmax": the network with its original attention, a baseline; "none": a network without any
AttentionKind = Literal["castling", "softmax", "none"]

OFFICIAL_THRESHOLD = 0.02  # of the auxiliary branch's mask, in GATECH-EIC/Castling-ViT attention.py


@dataclass(frozen=True)
class Output:
    """An output of a network: name, shape without the batch, axis letters."""

    name: str
    shape: tuple[int, ...]
    layout: str


def logits(classes: int) -> tuple[Output, ...]:
    """What every classifier returns."""
    return (Output("logits", (classes,), "C"),)


class ModelFamily(Protocol):
    """How to recognise, build and resize the networks of one family.

    `variants` maps a published name to its hyper-parameters at the published input size. A configuration is a frozen
    dataclass with at least `image_size` (height, width) in pixels, `channels`, `classes`, `aux_threshold` and
    `attention`. `baseline` is the name of the family with its original attention, None for a family without any.
    `preprocessing` holds the fields of Preprocessing in which the family differs from the usual.
    """

    name: str
    baseline: str | None
    title: str
    task: str
    reference: str
    variants: Mapping[str, Any]
    preprocessing: Mapping[str, Any]

    def recognises(self, tensors: Tensors) -> bool:
        """Whether these tensors are a network of this family."""

    def config_of(self, tensors: Tensors, image_size: Size | None, aux_threshold: float) -> Any:
        """The hyper-parameters, read off names and shapes. `image_size` is used where it fits the tensors: shapes tell
        how many tokens there are, not how high and wide their grid is."""

    def build(self, config: Any) -> nn.Module:
        """The network in training form, with fresh weights; `strict` loading of the family's tensors succeeds.

        Its attribute `config` is the configuration: what no tensor tells (the image size) is known of it when it is
        saved or exported.
        """

    def outputs(self, config: Any) -> tuple[Output, ...]:
        """What the network returns, in order; their meaning is that of `task` (castling_deploy.task)."""

    def resized(self, tensors: Tensors, config: Any, image_size: Size) -> tuple[Tensors, Any]:
        """The same network for another input size: tensors that depend on it interpolated, and the new config."""


FAMILIES: Mapping[str, str] = {
    "castling-deit": "castling_deploy.models.deit_family:DeiTFamily",
    "castling-levit": "castling_deploy.models.levit_family:LeViTFamily",
    "castling-mvitv2": "castling_deploy.models.mvit_family:MViTv2Family",
    "castling-levit-detector": "castling_deploy.models.detector:levit_detector",
    "castling-mvitv2-detector": "castling_deploy.models.detector:mvitv2_detector",
    "picodet": "castling_deploy.models.detector:picodet",
    "castling-deit-segmenter": "castling_deploy.models.segmenter:deit_segmenter",
    "castling-levit-segmenter": "castling_deploy.models.segmenter:levit_segmenter",
    "castling-mvitv2-segmenter": "castling_deploy.models.segmenter:mvitv2_segmenter",
}


def family_named(name: str) -> ModelFamily:
    """The family called `name`. Raises UsageError with a suggestion."""
    if name not in FAMILIES:
        raise UsageError(f"unknown model family '{name}'", hint=did_you_mean(name, FAMILIES))
    module, _, attribute = FAMILIES[name].partition(":")
    family: ModelFamily = getattr(importlib.import_module(module), attribute)()
    return family


def families() -> tuple[ModelFamily, ...]:
    """All families, in the order of the list."""
    return tuple(family_named(name) for name in FAMILIES)


def with_baselines(variants: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variants, castling-<name>, and after them the softmax baselines, <name>."""
    baselines = {
        name.removeprefix("castling-"): replace(config, attention="softmax") for name, config in variants.items()
    }
    return {**variants, **baselines}


def adapted(variant: Any, config: Any) -> Any:
    """A published configuration with what any network may choose for itself taken from another one."""
    names = {field.name for field in fields(variant)}
    free = names & {"image_size", "channels", "classes", "aux_threshold"}
    changes = {name: getattr(config, name) for name in free}
    if "backbone" in names and hasattr(config, "backbone"):
        changes["backbone"] = adapted(variant.backbone, config.backbone)
    return replace(variant, **changes)


def names_baseline(name: str) -> bool:
    """Whether a model's name asks for a softmax baseline: "deit" or "deit-tiny"."""
    return any(
        name == family.baseline or (name in family.variants and family.variants[name].attention == "softmax")
        for family in families()
    )


def attention_of(tensors: Tensors) -> AttentionKind:
    """The kind of attention: only linear-angular attention has a token convolution."""
    return "castling" if any(name.endswith("attn.dconv.weight") for name in tensors) else "softmax"


def recognised(tensors: Tensors) -> ModelFamily | None:
    """The family whose tensors these are, whatever its attention; None where there is none."""
    return next((family for family in families() if family.recognises(tensors)), None)


def family_of(tensors: Tensors, softmax: bool = False) -> ModelFamily:
    """The family whose tensors these are; a softmax baseline only where `softmax` allows it.

    Raises CheckpointError when there is none, or it is no Castling model.
    """
    family = recognised(tensors)
    if family is not None:
        if family.baseline is not None and attention_of(tensors) == "softmax" and not softmax:
            example = next(name for name, config in family.variants.items() if config.attention == "softmax")
            raise CheckpointError(
                f"this is a softmax network with the names of {family.title}: it has no 'attn.dconv.weight'",
                hint="only networks trained with linear-angular attention can be castled; "
                f"name it with --model (e.g. {example}) to export it as a softmax baseline; "
                "for experiments, --init-dconv zero adds an untrained token convolution",
            )
        return family
    some = ", ".join(list(tensors)[:3])
    closest = closest_family(tensors)
    message = f"no Castling network has tensors like these ({len(tensors)} of them: {some}, ...)"
    if closest is not None:
        more = ", ..." if len(closest.missing) > 3 else ""
        message += f"; the closest, {closest.title}, also has {', '.join(closest.missing[:3])}{more}"
    raise CheckpointError(message, hint=f"known families: {', '.join(FAMILIES)}")


@dataclass(frozen=True)
class Closest:
    """A family that has `share` of its tensor names among some tensors, and those that are missing."""

    title: str
    share: float
    missing: tuple[str, ...]


def closest_family(tensors: Tensors) -> Closest | None:
    """The family with most of its tensor names among these; None where none has any.

    Names are compared with their numbers left out, so that depths do not count.
    """
    present = {_pattern(name) for name in tensors}
    best: Closest | None = None
    for title, wanted in _published_names().items():
        share = len(wanted.keys() & present) / len(wanted)
        if share > (best.share if best else 0):
            best = Closest(title, share, tuple(name for pattern, name in wanted.items() if pattern not in present))
    return best


@cache
def _published_names() -> Mapping[str, Mapping[str, str]]:
    """Of every family, by its title: the patterns of its first variant's names, each with the first such name."""
    found = {}
    for family in families():
        with torch.device("meta"):
            names = list(family.build(next(iter(family.variants.values()))).state_dict())
        firsts: dict[str, str] = {}
        for name in names:
            if not name.endswith("num_batches_tracked"):
                firsts.setdefault(_pattern(name), name)
        found[family.title] = firsts
    return found


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def native_size(tokens: int, stride: int, stated: Size | None) -> Size:
    """The input size, in pixels, that gives `tokens` tokens of `stride` pixels: the stated one where it does, else a
    square. Raises CheckpointError where neither does."""
    if stated is not None and math.ceil(stated[0] / stride) * math.ceil(stated[1] / stride) == tokens:
        return stated
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"{tokens} tokens of {stride} pixels do not tell the image size", hint="pass --imgsz H,W")
    return side * stride, side * stride


def interpolated(grid: torch.Tensor, size: Size) -> torch.Tensor:
    """(1, C, h, w) -> (1, C, H, W): bicubic without antialiasing, as facebookresearch/deit main.py resizes."""
    return nn.functional.interpolate(grid.float(), size, mode="bicubic", align_corners=False).to(grid.dtype)


def tensor(tensors: Tensors, name: str) -> torch.Tensor:
    """The tensor called `name`. Raises CheckpointError when it is missing."""
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor '{name}'", hint="is the file complete?")
    return tensors[name]


def count(tensors: Tensors, prefix: str) -> int:
    """How many numbered children there are under `prefix`: blocks.0., blocks.1., ..."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)
