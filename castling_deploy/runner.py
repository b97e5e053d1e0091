"""Who can run an artefact: the list of runners, and what each promises.

One runner is one file in `witnesses/`: a class with the members of `Runner`. Every runner is optional, installs and
downloads nothing by itself, and runs in a process of its own (see `isolation.py`). A target's own witness, which every
export is verified by, is the first of them. This module imports no runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from castling_deploy.errors import UsageError
from castling_deploy.progress import Advance as Advance
from castling_deploy.suggest import did_you_mean
from castling_deploy.target import (
    TARGETS,
    Arithmetic,
    Artifact,
    Missing,
    Precision,
    Target,
    Witness,
    images_for,
    target_named,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.generic]


class Runner(Protocol):
    """A runtime, an emulator, a simulator, an evaluator or a compiler that takes artefacts of `targets`.

    `name` is what `castling verify --on` takes; runners of different targets may share one. `about` is what it is, in a
    few words for those who have not met it. `images` is how many probes it can afford (None: all of them; 0: it is a
    builder). One that computes in another precision than the artefact's has the member of `OwnArithmetic` too.
    """

    name: str
    about: str
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


@runtime_checkable
class SetUp(Runner, Protocol):
    """A runner that needs more than pip installs: `castling setup NAME` fetches and builds it into a folder, once."""

    def set_up(self, advance: Advance) -> None:
        """Fetch and build into `cache.cache_folder(name)`, whole or not at all. Raises SetupError."""


class OwnArithmetic(Protocol):
    """A runner that computes in another precision than the artefact's."""

    def arithmetic(self, precision: Precision) -> Precision | Arithmetic:
        """What it computes in, for an artefact of `precision`: it sets the limit of the comparison."""


class Required(Protocol):
    """A runner without which nothing is verified in some precisions: its target's own witness sees too little there."""

    required: tuple[Precision, ...]


class Narrow(Protocol):
    """A runner of artefacts in some precisions alone: any other it does not take, or computes as its target's own
    witness does."""

    precisions: tuple[Precision, ...]


class Choosy(Protocol):
    """A runner that does not take every artefact of its targets and precisions."""

    def unfit(self, artifact: Artifact) -> Missing | None:
        """Why it cannot run this one, and what to export instead; None where it can."""


RUNNERS: tuple[str, ...] = (
    "castling_deploy.witnesses.ort_half:OrtHalf",
    "castling_deploy.witnesses.openvino:OpenVINO",
    "castling_deploy.witnesses.openvino_bf16:OpenVINOBfloat16",
    "castling_deploy.witnesses.ort_arm64:OrtArm64",
    "castling_deploy.witnesses.ort_web:OrtWeb",
    "castling_deploy.witnesses.qnn:QnnHost",
    "castling_deploy.witnesses.executorch_arm64:ExecuTorchArm64",
    "castling_deploy.witnesses.tensorrt_rtx:RtxBuilder",
    "castling_deploy.witnesses.mil_half:MilHalf",
)
ALL = "all"


class OwnWitness:
    """A target's own witness: the strongest of its vendor's runtimes that is present here.

    What it can afford depends on the precision of the artefact.
    """

    def __init__(self, target: Target, precision: Precision | None = None) -> None:
        self._target = target
        self._witness = target.witness()
        self.name = target.runtime
        self.about = "the target's own witness: it verifies every export"
        self.targets: tuple[str, ...] = (target.name,)
        self.images: int | None = None if precision is None else images_for(target, precision)

    def missing(self) -> Missing | None:
        return self._target.missing()

    def witness(self) -> Witness:
        return self._witness

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact

        with self._target.load(folder) as session:
            self._witness = session.witness
            return run_artifact(session, artifact, inputs, advance)


def runners() -> tuple[Runner, ...]:
    """Every runner that is no target's own."""
    found = []
    for entry in RUNNERS:
        module, _, attribute = entry.partition(":")
        runner: Runner = getattr(importlib.import_module(module), attribute)()
        found.append(runner)
    return tuple(found)


def runners_of(target: Target, precision: Precision | None = None) -> Mapping[str, Runner]:
    """Whoever runs artefacts of this target, and has something to say of this precision, by name; its own witness
    first."""
    own: Runner = OwnWitness(target, precision)
    others = (runner for runner in runners() if target.name in runner.targets and tells(runner, precision))
    return {runner.name: runner for runner in (own, *others)}


def tells(runner: Runner, precision: Precision | None) -> bool:
    """Whether `runner` has something of its own to say of artefacts in this precision; None: in any."""
    return precision is None or precision in precisions_of(runner)


def precisions_of(runner: Runner) -> tuple[Precision, ...]:
    """The precisions of the artefacts that `runner` has something to say of."""
    precisions: tuple[Precision, ...] = getattr(runner, "precisions", tuple(Precision))
    return precisions


def required_for(target: Target, precision: Precision) -> tuple[Runner, ...]:
    """Whoever has to run every artefact of this target and precision, the target's own witness first."""
    own, *others = runners_of(target, precision).values()
    return own, *(runner for runner in others if precision in getattr(runner, "required", ()))


def exacting(target: Target, precision: Precision) -> Runner:
    """Whoever sees most of an artefact of this target and precision."""
    return required_for(target, precision)[-1]


def chosen(target: Target, precision: Precision, names: Sequence[str]) -> tuple[Runner, ...]:
    """The runners of this target that were asked for: those required where none was, every one for `all`.

    A name that other targets know is passed over. Raises UsageError for one that nobody knows, and for one that has
    nothing to say of this precision.
    """
    require_known(names)
    if not names:
        return required_for(target, precision)
    found = runners_of(target, precision)
    for name, runner in runners_of(target).items():
        if name in names and name not in found:
            raise UsageError(
                f"'{name}' has nothing of its own to say of an artefact in {precision}",
                hint=f"leave it out; it is for artefacts in {', '.join(precisions_of(runner))}",
            )
    if ALL in names:
        return tuple(found.values())
    return tuple(runner for name, runner in found.items() if name in names)


def require_known(names: Sequence[str]) -> None:
    """Raises UsageError with a suggestion for a name that no runner of any target has. Imports no runtime."""
    known = list(
        dict.fromkeys([ALL, *(target_named(one).runtime for one in TARGETS), *(one.name for one in runners())])
    )
    for name in names:
        if name not in known:
            raise UsageError(f"nothing called '{name}' runs artefacts", hint=did_you_mean(name, known))


def to_set_up() -> Mapping[str, SetUp]:
    """What `castling setup` can fetch and build, by name."""
    return {runner.name: runner for runner in runners() if isinstance(runner, SetUp)}


def unfit(runner: Runner, artifact: Artifact) -> Missing | None:
    """Why `runner` cannot run this artefact."""
    own = getattr(runner, "unfit", None)
    found: Missing | None = None if own is None else own(artifact)
    return found


def arithmetic_of(runner: Runner, precision: Precision) -> Precision | Arithmetic:
    """What `runner` computes artefacts of `precision` in."""
    own = getattr(runner, "arithmetic", None)
    computed: Precision | Arithmetic = precision if own is None else own(precision)
    return computed
