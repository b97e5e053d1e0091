"""What the user asked for, and what it comes to, target by target; decided without torch and without a toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from castling_deploy.errors import UsageError
from castling_deploy.isolation import Limits
from castling_deploy.target import Precision, Target, options_for, precision_for, target_named


@dataclass(frozen=True)
class Request:
    """What the user asked for. `options` holds only what was asked; each target refuses what it does not know."""

    targets: tuple[str, ...]
    checkpoint: Path | None = None
    model: str | None = None
    init_dconv: Literal["zero"] | None = None
    precision: str | None = None
    image_size: tuple[int, int] | None = None
    batch_size: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Path = Path("castling-out")
    benchmark: bool = True
    overwrite: bool = False
    seed: int = 0
    islands: bool = True  # modules in float32 that float16 cannot hold
    localise: bool = True  # where an artefact fails
    limits: Limits = field(default_factory=Limits)  # of every process that runs a toolchain or an artefact


@dataclass(frozen=True)
class Step:
    """One artefact to be made."""

    target: Target
    precision: Precision
    options: Any


def plan(request: Request) -> tuple[Step, ...]:
    """The artefacts to make. Whatever a target cannot honour is refused here, before anything heavy is imported."""
    if request.batch_size < 1:
        raise UsageError(f"a batch of {request.batch_size} images", hint="use 1 or more")
    targets = {target.name: target for target in map(target_named, request.targets)}
    steps = tuple(
        Step(target, precision_for(target, request.precision), options_for(target, request.options))
        for target in targets.values()
    )
    for step in steps:
        step.target.refuse(step.options, request.batch_size)
    return steps
