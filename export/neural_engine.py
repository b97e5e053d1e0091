"""Which operations of a Core ML program leave Apple's Neural Engine, or waste it, by its published rules.

The rules are those of apple/coreai-models (skills/model-authoring/references/neural_engine_rules.md), of coremltools'
issues, and of measured compute plans (rf-detr, issue 1495). They are read off the saved program: where an operation
really runs, Core ML alone decides, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from castling_deploy.export.mil_package import Operation, Package

FLOAT32 = "in float32"
RANK = "of more than 5 axes"
PADDED = "with a last axis of 1, which is padded to 32"
OPEN = "of open shape"
EVERY = "every operation"
ELSEWHERE = "that run on the CPU"
HARDSWISH = "that feed a Hardswish from two axes, which the engine rounds wrongly (coreai-torch, issue 51)"

LARGEST_RANK = 5
CPU = frozenset({"gather", "gather_along_axis", "gather_nd", "non_maximum_suppression", "scatter", "tile", "topk"})
BORDER = frozenset({"cast", "classify"})  # at the interface, which is in float32
CONSTANT = "constexpr_"  # computed before the program runs


def unfit(package: Package) -> Mapping[str, list[str]]:
    """Names of operations by what makes them unfit for the engine; empty where nothing is known to.

    A program in float32 never gets there: all of it is one finding.
    """
    found: dict[str, list[str]] = {}
    if all(output.dtype != "FLOAT16" for operation in package.operations for output in operation.outputs):
        return {FLOAT32: [EVERY]}
    into_hardswish = {
        name
        for operation in package.operations
        if operation.type == "hard_swish"
        for names in operation.inputs.values()
        for name in names
    }
    for operation in package.operations:
        for reason in _reasons(operation, into_hardswish):
            found.setdefault(reason, []).append(operation.name)
    return dict(sorted(found.items()))


def _reasons(operation: Operation, into_hardswish: set[str]) -> Iterator[str]:
    if operation.type in BORDER or operation.type.startswith(CONSTANT):
        return
    outputs = operation.outputs
    if any(output.dtype == "FLOAT32" for output in outputs):
        yield FLOAT32
    if any(len(output.shape) > LARGEST_RANK for output in outputs):
        yield RANK
    if any(None in output.shape for output in outputs):
        yield OPEN
    if any(output.shape[-1:] == (1,) and set(output.shape) != {1} for output in outputs):
        yield PADDED
    if operation.type in CPU:
        yield ELSEWHERE
    if operation.type in ("linear", "matmul") and any(
        output.name in into_hardswish and len(output.shape) == 2 for output in outputs
    ):
        yield HARDSWISH


def note(found: Mapping[str, list[str]], operations: int) -> list[str]:
    """One line for the report, where there is anything to say."""
    if not found:
        return []
    if found == {FLOAT32: [EVERY]}:
        return ["the Neural Engine computes in float16: this program runs on the CPU or the GPU"]
    names = {name for group in found.values() for name in group}
    reasons = "; ".join(f"{len(group)} {reason}" for reason, group in found.items())
    return [f"by Apple's rules for the Neural Engine {len(names)} of {operations} operations are unfit: {reasons}"]
