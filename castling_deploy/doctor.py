"""Which targets can be exported and run here, and the exact line that mends what cannot."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from castling_deploy.runner import OwnWitness, runners
from castling_deploy.target import TARGETS, Missing, Witness, target_named

TOOLS = (
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "coremltools",
    "executorch",
    "tensorrt",
    "tensorrt-rtx",
    "safetensors",
)


@dataclass(frozen=True)
class TargetHealth:
    """One target on this machine."""

    target: str
    precisions: tuple[str, ...]
    missing: Missing | None
    unfinished: Missing | None
    witness: Witness


@dataclass(frozen=True)
class RunnerHealth:
    """One runner of `castling verify --on` on this machine."""

    name: str
    targets: tuple[str, ...]
    missing: Missing | None
    witness: Witness | None


@dataclass(frozen=True)
class Health:
    """The machine, its tools (None: not installed), and what each target and each runner can do here."""

    system: str
    python: str
    tools: dict[str, str | None]
    targets: tuple[TargetHealth, ...]
    runners: tuple[RunnerHealth, ...]


def examine() -> Health:
    """Look, import nothing heavy, install nothing."""
    targets = [target_named(name) for name in TARGETS]
    return Health(
        platform.platform(terse=True),
        platform.python_version(),
        {tool: _version(tool) for tool in TOOLS},
        tuple(
            TargetHealth(target.name, tuple(target.precisions), target.missing(), target.unfinished(), target.witness())
            for target in targets
        ),
        tuple(
            RunnerHealth(runner.name, runner.targets, missing, None if missing else runner.witness())
            for runner in (*map(OwnWitness, targets), *runners())
            for missing in (runner.missing(),)
        ),
    )


def _version(tool: str) -> str | None:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return None
