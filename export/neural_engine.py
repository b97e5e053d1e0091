"""Which operations of a Core ML or Core AI program leave Apple's Neural Engine, or waste it, by its published rules.

The rules are those of apple/coreai-models (skills/model-authoring/references/neural_engine_rules.md), of coremltools'
issues, and of measured compute plans (rf-detr, issue 1495). They are read off the saved program: where an operation
really runs, Core ML or Core AI alone decides, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FLOAT32 = "in float32"
RANK = "of more than 5 axes"
PADDED = "with a last axis of 1, which is padded to 32"
OPEN = "of open shape"
EVERY = "every operation"
ELSEWHERE = "that run on the CPU"
HARDSWISH = "that feed a Hardswish from two axes, which the engine rounds wrongly (coreai-torch, issue 51)"

LARGEST_RANK = 5
CPU = frozenset(
    {
        *("gather", "gather_along_axis", "gather_nd", "non_maximum_suppression"),
        *("scatter", "scatter_along_axis", "scatter_nd", "tile", "topk"),
    }
)
BORDER = frozenset({"cast", "classify"})  # at the interface, which is in float32
# Core ML's names, and Core AI's: there a Hardswish is x hard_sigmoid(x), and a bias is added by itself
PRODUCTS = frozenset({"linear", "matmul", "batch_matmul", "broadcasting_batch_matmul"})
SUMS = frozenset({"add", "broadcasting_add"})
HARD = frozenset({"hard_swish", "hard_sigmoid"})


@dataclass(frozen=True)
class Value:
    """What an operation gives: numpy's name of its dtype, and its shape with None where it is open."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Step:
    """An operation that runs, in any format; `inputs` are names of values."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]


def unfit(steps: Sequence[Step]) -> Mapping[str, list[str]]:
    """Names of a program's operations by what makes them unfit for the engine; empty where nothing is known to.

    A program in float32 never gets there: all of it is one finding.
    """
    found: dict[str, list[str]] = {}
    if all(output.dtype != "float16" for step in steps for output in step.outputs):
        return {FLOAT32: [EVERY]}
    into_hardswish: set[str] = set()
    for step in reversed(steps):
        added = step.type in SUMS and any(output.name in into_hardswish for output in step.outputs)
        if step.type in HARD or added:
            into_hardswish.update(step.inputs)
    for step in steps:
        for reason in _reasons(step, into_hardswish):
            found.setdefault(reason, []).append(step.name)
    return dict(sorted(found.items()))


def _reasons(step: Step, into_hardswish: set[str]) -> Iterator[str]:
    if step.type in BORDER:
        return
    outputs = step.outputs
    if any(output.dtype == "float32" for output in outputs):
        yield FLOAT32
    if any(len(output.shape) > LARGEST_RANK for output in outputs):
        yield RANK
    if any(None in output.shape for output in outputs):
        yield OPEN
    if any(output.shape[-1:] == (1,) and set(output.shape) != {1} for output in outputs):
        yield PADDED
    if step.type in CPU:
        yield ELSEWHERE
    if step.type in PRODUCTS and any(output.name in into_hardswish and len(output.shape) == 2 for output in outputs):
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
