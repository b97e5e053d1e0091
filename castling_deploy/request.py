"""What the user asked for, and what it comes to, target by target; decided without torch and without a toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from castling_deploy.errors import UsageError
from castling_deploy.isolation import Limits
from castling_deploy.reading.card import Told
from castling_deploy.target import (
    Precision,
    Target,
    computes_in_half,
    options_for,
    precision_for,
    target_named,
)

OF_INT8 = frozenset({"activations", "palettise", "weight_bits"})  # options that mean nothing in another precision


@dataclass(frozen=True)
class Int8:
    """How int8 is calibrated: a folder or .npz file of images (None: the bundled ones), how many of them, and how many
    points of the task's score it may cost."""

    data: Path | None = None
    samples: int | None = None
    max_drop: float = 0.5


@dataclass(frozen=True)
class Request:
    """What the user asked for. `options` holds only what was asked; each target refuses what it does not know."""

    targets: tuple[str, ...]
    checkpoint: Path | None = None
    model: str | None = None
    init_dconv: Literal["zero"] | None = None
    told: Told = field(default_factory=Told)  # of the checkpoint
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
    int8: Int8 = field(default_factory=Int8)
    jobs: int | None = None  # artefacts at once; None: by cores and memory
    limits: Limits = field(default_factory=Limits)  # of every process that runs a toolchain or an artefact


@dataclass(frozen=True)
class Step:
    """One artefact to be made."""

    target: Target
    precision: Precision
    options: Any

    @property
    def in_half(self) -> bool:
        """Whether it computes in float16."""
        return computes_in_half(self.precision, self.options.form.activations)


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
        if step.precision is Precision.INT8 and (request.batch_size != 1 or getattr(step.options, "dynamic", False)):
            raise UsageError("int8 is built for a batch of one", hint="leave out --batch-size and --dynamic")
        for name in OF_INT8 & request.options.keys():
            if step.precision is not Precision.INT8:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is for int8", hint=f"leave out {flag}, or add --precision int8")
        if step.precision is not Precision.INT8 and request.int8 != Int8():
            raise UsageError(
                f"target '{step.target.name}' in {step.precision} has nothing to calibrate",
                hint="leave out --calib-data, --calib-samples and --max-drop, or add --precision int8",
            )
    if request.int8.data is not None and not request.int8.data.exists():
        raise UsageError(f"there is nothing at '{request.int8.data}'", hint="name a folder of images, or an .npz file")
    return steps
