"""What a target promises, and the list of targets.

One target is one file in `export/`: a class with the members of `Target` and a frozen dataclass of the options it
understands. What a format can do is written there and nowhere else; the pipeline reads it through this protocol and
knows no format's name. This module imports no toolchain and no torch, so that `castling --help` stays quick.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import UsageError
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.suggest import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

    Arrays = Mapping[str, npt.NDArray[np.generic]]


class Precision(StrEnum):
    """Arithmetic an artefact is built for."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Arithmetic(StrEnum):
    """What a runtime may compute in, though no artefact is built for it."""

    BF16 = "bf16"


class WitnessKind(StrEnum):
    """How much a witness's word is worth, strongest first. A report never calls a witness more than it is."""

    DEVICE = "device"
    RUNTIME = "runtime"
    SIMULATED = "simulated"
    EMULATED = "emulated"
    REFERENCE = "reference"
    BUILDER = "builder"

    @property
    def meaning(self) -> str:
        """What ran the artefact, in words."""
        return MEANING[self]


MEANING: Mapping[WitnessKind, str] = {
    WitnessKind.DEVICE: "the real device",
    WitnessKind.RUNTIME: "the vendor's runtime, on this machine",
    WitnessKind.SIMULATED: "the vendor's simulator of the device",
    WitnessKind.EMULATED: "the device's instructions, emulated",
    WitnessKind.REFERENCE: "the artefact's own program and weights, not the vendor's runtime",
    WitnessKind.BUILDER: "the vendor's compiler took it; nothing was run",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an artefact: name, shape (B first), numpy dtype name, axis letters.

    `content` is "image" where the artefact takes raw uint8 pixels (B, H, W, C) and normalises them itself,
    "tensor" where it takes what `Preprocessing.normalised` returns. A dynamic axis is -1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    content: Literal["tensor", "image"] = "tensor"


@dataclass(frozen=True)
class Network:
    """What every exporter is handed: a folded network in eval mode, in float32, and the facts around it.

    `module` maps (B, C, H, W) float32, normalised, to logits (B, classes). For float16, `islands` are paths of modules
    that have to be computed in float32, `reductions` of those whose sums, means and norms have to be (`range_audit`
    finds both). A `part` of a network, cut out to find where an artefact goes wrong, has an input and an output of any
    rank, and maybe no product that an exporter could check.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    description: str
    metadata: Mapping[str, str]
    islands: tuple[str, ...] = ()
    reductions: tuple[str, ...] = ()
    part: bool = False
    quantisation: Quantisation | None = None  # for int8, and for nothing else

    def example(self) -> tuple[torch.Tensor, ...]:
        """Deterministic inputs of the right shape for tracing; no two values alike, none of them zero."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(spec.shape, generator=generator) for spec in self.inputs)


@dataclass(frozen=True)
class Missing:
    """Why a target, or the last step of one, cannot run here, and the exact line that mends it."""

    reason: str
    fix: str


@dataclass(frozen=True)
class Artifact:
    """What an exporter wrote into its folder.

    `files` are relative to the folder (a package that is a directory counts as one). `details` are facts about what
    was built (opset, delegates, ...) for the report and the manifest. `usage` is Markdown: how to load the artefact
    in the languages of its platform. `unfinished` says what a last step still needs (an engine without its builder).
    """

    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tools: Mapping[str, str]
    loads_with: tuple[str, ...]
    usage: str
    details: Mapping[str, Any] = field(default_factory=dict)
    unfinished: Missing | None = None


@dataclass(frozen=True)
class Attestation:
    """What the files of an artefact say about themselves: in which types it computes and stores its weights.

    `products` are convolutions and matrix products by precision ("fp32", "fp16", "int8"), which is what a precision
    is asked for; `operations` all operations, `weight_bytes` all constants, both by numpy's name of the dtype.
    `problems` is empty where the files are in the precision that is claimed (float32 islands are counted, not blamed)
    and declare the inputs, outputs and details that the artefact claims.
    `facts` are what the exporter stated in the files (`castling_deploy.facts`).
    """

    precision: Precision
    products: Mapping[str, int]
    operations: Mapping[str, int]
    weight_bytes: Mapping[str, int]
    problems: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Witness:
    """Who executed an artefact: its name with the version, and how much its word is worth.

    One that is `interpreted` computes what the device does, step by step: its time says nothing of the device.
    """

    name: str
    kind: WitnessKind
    interpreted: bool = False


class Session(Protocol):
    """An artefact, loaded from disk and ready to run."""

    witness: Witness

    def __call__(self, inputs: Arrays) -> Arrays:
        """Inputs by name, in the shapes and dtypes of the artefact's specs, to outputs by name."""


class Target(Protocol):
    """A format. Class members are data; the methods are all that differs from format to format.

    `file` is the file or package that every artefact of the target has. `precisions[0]` is the default. `options` is a
    frozen dataclass with the member of `Options`: its fields are the options the target understands, and its
    `__post_init__` refuses bad values; a field with `metadata={"task": ...}` is for networks of that task alone.
    `extra` is the pip extra that installs the toolchain. `runtime` is what `castling verify --on` calls the target's
    own witness. `selftests` are the programs that travel with an artefact: their file names, and the templates in
    `selftests/` that they are made from.
    """

    name: str
    file: str
    extra: str
    runtime: str
    precisions: tuple[Precision, ...]
    options: type[Any]
    selftests: Mapping[str, str]

    def missing(self) -> Missing | None:
        """What keeps this target from exporting here; None when nothing does. Imports no toolchain."""

    def unfinished(self) -> Missing | None:
        """What a last step still needs here (an engine without its builder); None when an export is complete."""

    def witness(self) -> Witness:
        """Who runs an artefact of this target on this machine. Imports no toolchain."""

    def refuse(self, options: Any, batch_size: int) -> None:
        """Raises UsageError for options and a batch that do not go together; imports nothing heavy."""

    def lowered(self, network: Network, options: Any) -> nn.Module:
        """The graph that the format's converter is handed, in float32, as a module of `network.inputs`' shapes.

        What rewrites it for the target is exact, so in float64 it computes what `network.module` does. Raises
        ExportError.
        """

    def export(self, network: Network, precision: Precision, options: Any, folder: Path) -> Artifact:
        """Write the artefact into `folder` (which exists and is empty). Raises ExportError."""

    def attest(self, folder: Path, artifact: Artifact, precision: Precision) -> Attestation:
        """Whether the files of `folder` are in `precision`, read from them alone. Raises ExportError where they cannot
        be read."""

    def dequantised(self, folder: Path) -> Sequence[npt.NDArray[np.floating]]:
        """What everything stands for that an int8 artefact stores in levels or tables, read from its files alone.

        Weights are (C_out, ...), in the dtype of their scales or of the table. Raises ExportError.
        """

    def load(self, folder: Path, *, threads: int = 1) -> AbstractContextManager[Session]:
        """The artefact of `folder`, loaded by the strongest witness present here. Raises ExportError."""


@runtime_checkable
class Readable(Protocol):
    """A target whose artefacts tell their constants, which says more of a file that went wrong."""

    def constants(self, folder: Path) -> Arrays:
        """Weights and other constants of the artefact in `folder` by name, in the file's order and dtypes."""


@runtime_checkable
class Scripted(Protocol):
    """A target whose artefacts can be run by a few lines of Python without this tool."""

    def script(self) -> str:
        """Source of `run(folder, inputs)`: arrays by name, in the shapes of the artefact, to outputs by name."""


class SlowWitness(Protocol):
    """A target whose witness is too slow for all probes in some precisions: an optional member of it."""

    images: Mapping[Precision, int]  # real images that the witness can afford; a precision left out: all of them


class Laborious(Protocol):
    """A target that takes longer than others: an optional member of it."""

    effort: float  # s that the bundled network takes to it, verification included, on one core beside another


def effort_of(target: Target) -> float:
    """How long an artefact takes, roughly: for who is begun first."""
    effort: float = getattr(target, "effort", 0.0)
    return effort


class Options(Protocol):
    """What the options of every target have, beside their fields."""

    @property
    def form(self) -> Quantisation:
        """What levels are in an int8 artefact of theirs; it holds no module."""


def computes_in_half(precision: Precision, activations: Activations) -> bool:
    """Whether an artefact computes in float16: for 8 bits with these activations too."""
    return precision is Precision.FP16 or (precision is Precision.INT8 and activations is Activations.FLOAT16)


def images_for(target: Target, precision: Precision) -> int | None:
    """How many real images the witness of this target can afford; None: all of them."""
    images: Mapping[Precision, int] = getattr(target, "images", {})
    return images.get(precision)


TARGETS: Mapping[str, str] = {
    "onnx": "castling_deploy.export.to_onnx:OnnxTarget",
    "tensorrt": "castling_deploy.export.to_tensorrt:TensorRTTarget",
    "coreml": "castling_deploy.export.to_coreml:CoreMLTarget",
    "executorch": "castling_deploy.export.to_executorch:ExecuTorchTarget",
    "coreai": "castling_deploy.export.to_coreai:CoreAITarget",
}
ALIASES: Mapping[str, str] = {
    "trt": "tensorrt",
    "engine": "tensorrt",
    "mlpackage": "coreml",
    "ios": "coreml",
    "pte": "executorch",
    "aimodel": "coreai",
}


def target_named(name: str) -> Target:
    """The target called `name`, or by one of its aliases. Raises UsageError with a suggestion."""
    name = name.strip().lower()
    name = ALIASES.get(name, name)
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}'", hint=did_you_mean(name, [*TARGETS, *ALIASES]))
    module, _, attribute = TARGETS[name].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target


def options_for(target: Target, asked: Mapping[str, Any]) -> Any:
    """The target's own options from what the user asked for. No option is ignored: one it lacks is a UsageError."""
    known = {item.name for item in dataclasses.fields(target.options)}
    for name in asked:
        if name not in known:
            can = ", ".join("--" + item.replace("_", "-") for item in sorted(known)) or "none"
            raise UsageError(
                f"target '{target.name}' has no option --{name.replace('_', '-')}",
                hint=f"leave it out for this target; its own options: {can}",
            )
    return target.options(**asked)


def refuse_for_task(target: Target, options: Any, task: str) -> None:
    """Raises UsageError for an option that means nothing to networks of this task: one whose field names another."""
    for item in dataclasses.fields(options):
        meant = item.metadata.get("task", task)
        if meant != task and getattr(options, item.name) != item.default:
            flag = "--" + item.name.replace("_", "-")
            raise UsageError(
                f"target '{target.name}' has {flag} for {meant} alone, and this is a network for {task}",
                hint=f"leave out {flag} for this network",
            )


def precision_for(target: Target, asked: str | None) -> Precision:
    """The precision to build: the one asked for, or the target's default. Raises UsageError."""
    if asked is None:
        return target.precisions[0]
    names = [precision.value for precision in Precision]
    if asked not in names:
        raise UsageError(f"unknown precision '{asked}'", hint=did_you_mean(asked, names))
    if Precision(asked) not in target.precisions:
        can = ", ".join(target.precisions)
        raise UsageError(f"target '{target.name}' cannot be built in {asked}", hint=f"it can be built in: {can}")
    return Precision(asked)
