"""What runs of a Core AI program, as the rules for the Neural Engine look at it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from castling_deploy.export.neural_engine import Step, Value

NUMPY = {  # MLIR's names of types, and numpy's
    **{"f16": "float16", "f32": "float32", "f64": "float64", "i1": "bool"},
    **{f"{sign}i{bits}": f"{full}int{bits}" for sign, full in (("s", ""), ("u", "u")) for bits in (8, 16, 32, 64)},
}
CALLEE = re.compile(r"@(\w+)")


def steps_of(function: Any) -> Iterator[Step]:
    """The operations of an MLIR function in order, but for those of constants alone, as a transposed weight.

    MLIR's values have no names: a step is called by its kind and its number among those, `transpose.3`. A composite,
    one operation to a device, is one step, whatever it is written out as.
    """
    (block,) = function.regions[0].blocks
    names = {argument: f"input.{number}" for number, argument in enumerate(block.arguments)}
    numbers: Counter[str] = Counter()
    for operation in (found.operation for found in block.operations):
        inputs = tuple(names[operand] for operand in operation.operands if operand in names)
        kind = operation.name.rpartition(".")[2]
        if not inputs or kind == "output":
            continue
        if kind == "invoke":
            kind = composite(CALLEE.findall(str(operation.attributes["callee"]))[0])
        numbers[kind] += 1
        name = f"{kind}.{numbers[kind]}"
        names |= dict.fromkeys(operation.results, name)
        yield Step(name, kind, inputs, tuple(value(name, result.type) for result in operation.results))


def value(name: str, kind: Any) -> Value:
    """Of an MLIR tensor."""
    sizes = (None if kind.is_dynamic_dim(axis) else size for axis, size in enumerate(kind.shape))
    return Value(name, NUMPY.get(str(kind.element_type), str(kind.element_type)), tuple(sizes))


def composite(name: str) -> str:
    """layer_norm_3 is a layer_norm."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else name
