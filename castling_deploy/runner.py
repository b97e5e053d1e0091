"""Who can run an artefact: the list of runners, and what each promises.

One runner is one file in `witnesses/`: a class with the members of `Runner`. Every runner is optional, installs and
downloads nothing by itself, and runs in a process of its own (see `isolation.py`). A target's own witness, which every
export is verified by, is the first of them. This module imports no runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from castling_deploy.errors import UsageError
from castling_deploy.suggest import did_you_mean
from castling_deploy.target import Artifact, Missing, Precision, Witness

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.generic]

Advance = Callable[[float], None]


class Runner(Protocol):
    """A runtime, an emulator, a simulator, an evaluator or a compiler that takes artefacts of `targets`.

    `name` is what `castling verify --on` takes; runners of different targets may share one. `images` is how many probes
    it can afford (None: all of them; 0: it is a builder). One that computes in another precision than the artefact's
    has the member of `OwnArithmetic` too.
    """

    name: str
    targets: tuple[str, ...]
    images: int | None

    def missing(self) -> Missing | None:
        """What keeps it from running here, and the line that mends it; None when nothing does. Imports no runtime."""

    def witness(self) -> Witness:
        """Its name with the version, and how much its word is worth. Imports no runtime."""

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        """Every output on `inputs` (P, ...) by name, P first, computed by the files of `folder` alone.

        A runner of kind BUILDER runs nothing and returns nothing: that it took the artefact is its word. `advance` is
        called with the share done. Raises ExportError.
        """


class SetUp(Protocol):
    """A runner that needs more than pip installs: `castling setup NAME` fetches and builds it into a folder, once."""

    name: str

    def set_up(self, advance: Advance) -> None:
        """Fetch and build into `cache.cache_folder(name)`, whole or not at all. Raises SetupError."""


class OwnArithmetic(Protocol):
    """A runner that computes in another precision than the artefact's."""

    def arithmetic(self, precision: Precision) -> Precision:
        """The precision it computes in, for an artefact of `precision`: it sets the limit of the comparison."""


RUNNERS: tuple[str, ...] = (
    "castling_deploy.witnesses.openvino:OpenVINO",
    "castling_deploy.witnesses.qnn:QnnHost",
    "castling_deploy.witnesses.ort_web:OrtWeb",
    "castling_deploy.witnesses.tensorrt_rtx:RtxBuilder",
)


def runners_for(target: str) -> Mapping[str, Runner]:
    """The runners of artefacts of this target by name, besides the target's own witness."""
    found: dict[str, Runner] = {}
    for entry in RUNNERS:
        module, _, attribute = entry.partition(":")
        runner: Runner = getattr(importlib.import_module(module), attribute)()
        if target in runner.targets:
            found[runner.name] = runner
    return found


def runner_named(target: str, name: str) -> Runner:
    """The runner of this target called `name`. Raises UsageError with a suggestion."""
    found = runners_for(target)
    if name not in found:
        raise UsageError(
            f"nothing called '{name}' runs artefacts of target '{target}'", hint=did_you_mean(name, list(found))
        )
    return found[name]


def needs_setup(runner: Any) -> bool:
    """Whether `castling setup` has something to do for it."""
    return hasattr(runner, "set_up")


def arithmetic_of(runner: Any, precision: Precision) -> Precision:
    """The precision in which `runner` computes an artefact of `precision`: the same, unless it says otherwise."""
    return runner.arithmetic(precision) if hasattr(runner, "arithmetic") else precision
