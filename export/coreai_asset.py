"""An .aimodel folder: written the same way every time, and read back for what is in it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError
from castling_deploy.export.coreai_program import FUNCTION
from castling_deploy.export.coreai_steps import NUMPY, composite, steps_of
from castling_deploy.palette import BITS, unpacked

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from castling_deploy.export.neural_engine import Step
    from castling_deploy.target import Arrays

PROGRAM, DIGEST, METADATA = "main.mlirb", "main.hash", "metadata.json"
MAGIC = b"ML\xefR"  # of MLIR's bytecode
OURS = "castling"  # the key of our facts in the metadata that a creator may define
FLOATS = {"f16": "float16", "f32": "float32", "bf16": "bfloat16", "f64": "float64"}  # MLIR's names, and numpy's
PACKED = frozenset(f"{sign}i{bits}" for sign in "su" for bits in range(1, 8))  # numpy has no type for them
RESOURCE = re.compile(r'^ +(\w+): "0x([0-9A-F]*)"', re.MULTILINE)
REFERENCE = re.compile(r"dense_resource<(\w+)>")
DEQUANTISE, LOOK_UP, TRANSPOSE = "coreai.blockwise_shift_scale", "coreai.lut_to_dense", "coreai.transpose"
LEVELS = {  # by the operation that makes weights of them: the types that they are stored in
    DEQUANTISE: frozenset({"si8"}),
    LOOK_UP: frozenset(f"ui{bits}" for bits in BITS),
}
PRODUCTS = ("matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
PARAMETRISED = frozenset({"coreai.interpolate"})  # takes its scale and offset as float32 constants, whatever it scales


@dataclass(frozen=True)
class Operation:
    """One operation of a program: `graph` is the function or the composite it stands in, without its number.

    `floats` are the floating-point types of its operands and results by numpy's names; those of the results are
    `results`. `levels` is MLIR's name of the type that an operand's weights are stored in, where that is int8 with
    scales or indices into a table.
    """

    graph: str
    name: str
    floats: frozenset[str]
    results: frozenset[str]
    levels: str | None = None


@dataclass(frozen=True)
class AssetContents:
    """What a saved asset holds. Inputs and outputs are (name, MLIR type).

    `steps` are what runs of it, a composite as the one operation that it is to a device.
    `constants` are in the program's order; a large one has the name of its resource, `weight_3`, another that of its
    graph with its place among the constants there, `main.12`.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    metadata: Mapping[str, Any]
    constants: Arrays
    steps: tuple[Step, ...]


def write_asset(program: Any, path: Path, description: str, facts: Mapping[str, str]) -> None:
    """Save a program with its facts. The date of creation is left out, and the keys of the metadata are sorted."""
    from coreai.runtime import AIModelAssetMetadata

    metadata = AIModelAssetMetadata()
    metadata.model_description = description
    metadata.set_custom(OURS, dict(facts))
    asset = program.save_asset(path, metadata)
    asset.update_metadata(lambda written: setattr(written, "creation_date", None))
    written = json.loads((path / METADATA).read_text())
    (path / METADATA).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def require_whole(path: Path) -> None:
    """Raises ExportError for an asset with a file missing or a program that is not the one its digest was made of.

    The runtime (1.0.0b3) does not look at the digest itself, and ends the process when the program cannot be read.
    """
    hint = "export the network again"
    for name in (PROGRAM, DIGEST, METADATA):
        if not (path / name).is_file():
            raise ExportError(f"there is no {name} in {path}", hint=hint)
    data = (path / PROGRAM).read_bytes()
    if not data.startswith(MAGIC):
        raise ExportError(f"{path.name} is damaged: {PROGRAM} is no program", hint=hint)
    if hashlib.sha256(data).digest() != (path / DIGEST).read_bytes():
        raise ExportError(f"{path.name} is damaged: {PROGRAM} does not have the digest in {DIGEST}", hint=hint)
    try:
        json.loads((path / METADATA).read_text())
    except ValueError as error:
        raise ExportError(f"{path.name} is damaged: {METADATA}: {error}", hint=hint) from error


def program_of(path: Path) -> Any:
    """The asset's program as MLIR's module. Raises ExportError for a damaged one."""
    from coreai.authoring import AIModelAsset

    require_whole(path)
    try:
        return AIModelAsset.load(path).program._module._mlir_module
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"coreai does not read {path.name}: {error}", hint="export the network again") from error


def read_asset(path: Path) -> AssetContents:
    """What the asset on disk holds. Raises ExportError for a damaged one."""
    module = program_of(path)
    (function,) = (found for found in module.body.operations if found.attributes["sym_name"].value == FUNCTION)
    kind = function.attributes["function_type"].value
    inputs = named(function.attributes["arg_attrs"], kind.inputs)
    outputs = named(function.attributes["res_attrs"], kind.results)
    operations = tuple(operations_of(module.operation, ""))
    metadata = json.loads((path / METADATA).read_text())
    try:
        constants = dict(constants_of(module))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ExportError(f"the constants of {path.name} cannot be read: {error}") from error
    return AssetContents(operations, inputs, outputs, metadata, constants, tuple(steps_of(function)))


def named(attributes: Any, types: Any) -> tuple[tuple[str, str], ...]:
    """Names and MLIR types of a function's inputs, or of its outputs."""
    return tuple((given["coreai.name"].value, str(kind)) for given, kind in zip(attributes, types))


def operations_of(operation: Any, graph: str) -> Iterator[Operation]:
    """Every operation inside `operation`, in order, regions after their owner; of constants those that are data."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in (found.operation for found in block.operations):
                name = inner.name.rpartition(".")[2]
                if name == "constant" and all(use.owner.name in PARAMETRISED for use in inner.results[0].uses):
                    continue
                if name == "graph":
                    yield from operations_of(inner, composite(inner.attributes["sym_name"].value))
                    continue
                results = floats(inner.results)
                levels = next(filter(None, map(levels_of, inner.operands)), None)
                yield Operation(graph, name, floats(inner.operands) | results, results, levels)
                yield from operations_of(inner, graph)


def levels_of(value: Any) -> str | None:
    """The type of the levels or indices that an MLIR value is made of, maybe transposed since, as torch's Linear has
    its weights."""
    from coreai._compiler.ir import OpResult

    while OpResult.isinstance(value):
        maker: Any = OpResult(value).owner
        if maker.name in LEVELS:
            stored = str(maker.operands[0].type.element_type)
            return stored if stored in LEVELS[maker.name] else None
        if maker.name != TRANSPOSE:
            return None
        value = maker.operands[0]
    return None


def product_types(contents: AssetContents) -> Counter[str]:
    """Products by numpy's name of the type that they are in, or "int8" where their weights are, or are looked up by as
    many bits or fewer; by both where one mixes two."""
    return Counter(
        "int8" if operation.levels else " and ".join(sorted(operation.floats))
        for operation in contents.operations
        if operation.name.endswith(PRODUCTS)
    )


def look_up_tables(contents: AssetContents) -> dict[str, int]:
    """How many weights of products are in look-up tables, by the bits of an index."""
    kinds = (operation.levels for operation in contents.operations if operation.name.endswith(PRODUCTS))
    return dict(Counter(kind.removeprefix("ui") for kind in kinds if kind in LEVELS[LOOK_UP]))


def constants_of(module: Any) -> Iterator[tuple[str, Any]]:
    """Name and values of every constant; numbers of less than a byte as the bytes that they are packed in."""
    return ((name, values) for name, values, _ in named_constants(module))


def named_constants(module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Those, and MLIR's value that each is.

    MLIR's Python keeps the large ones, its resources, to itself (coreai-core 1.0.0b3); its text has them, as
    hexadecimal: four bytes of alignment, then the numbers.
    """
    import numpy as np

    text: str = module.operation.get_asm(enable_debug_info=False)
    blobs = {name: bytes.fromhex(digits)[4:] for name, digits in RESOURCE.findall(text)}
    for graph in (found.operation for found in module.body.operations):
        stem = graph.attributes["sym_name"].value
        for number, constant in enumerate(one for one in nested(graph) if one.name.endswith(".constant")):
            value, kind = constant.attributes["value"], constant.results[0].type
            element = str(kind.element_type)
            if resource := REFERENCE.match(str(value)):
                dtype, shape = ("uint8", -1) if element in PACKED else (NUMPY[element], kind.shape)
                values = np.frombuffer(blobs[resource[1]], dtype).reshape(shape)
                yield resource[1], values, constant.results[0]
            elif element in PACKED:  # coreai-core 1.0.0b3 would end the process
                raise ValueError(f"a constant of {kind} is not among its resources")
            else:
                yield f"{stem}.{number}", np.array(value), constant.results[0]


def dequantised(path: Path) -> list[npt.NDArray[np.floating]]:
    """What the levels and the indices into tables of the asset on disk stand for. Raises ExportError."""
    module = program_of(path)
    try:
        held = {value: values for _, values, value in named_constants(module)}
        makers = (one for one in nested(module.operation) if one.name in LEVELS)
        return [MAKES[one.name](one.results[0].type.shape, *(held[value] for value in one.operands)) for one in makers]
    except (RuntimeError, ValueError, KeyError) as error:
        raise ExportError(f"the weights of {path.name} cannot be read: {error}") from error


def shifted_and_scaled(shape: list[int], levels: Any, scale: Any, before: Any, after: Any) -> Any:
    """A row or a column shares a number of each of the others. Raises ValueError for smaller blocks."""
    return ((levels.astype("float32") - before) * scale + after).astype(after.dtype)


def looked_up(shape: list[int], indices: Any, table: Any, axis: Any) -> Any:
    """One table for the whole of it. Raises ValueError for several."""
    entries = table.reshape(-1)
    if table.shape[-2] != len(entries):
        raise ValueError(f"tables of shape {table.shape}")
    if indices.shape != tuple(shape):
        indices = unpacked(indices, len(entries).bit_length() - 1, math.prod(shape)).reshape(shape)
    return entries[indices]


MAKES: Mapping[str, Callable[..., Any]] = {DEQUANTISE: shifted_and_scaled, LOOK_UP: looked_up}


def nested(operation: Any) -> Iterator[Any]:
    """Every operation inside `operation`, in order."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in (found.operation for found in block.operations):
                yield inner
                yield from nested(inner)


def floats(values: Any) -> frozenset[str]:
    """The floating-point types among those of MLIR values."""
    types = (str(value.type) for value in values)
    last = (text.rpartition("x")[2].rpartition("<")[2].strip("<> ") for text in types)
    return frozenset(FLOATS[name] for name in last if name in FLOATS)


def counts(contents: AssetContents) -> dict[str, int]:
    """How many operations of each kind and type of result there are, composites' own in the composite's name."""
    found = Counter(
        " ".join([label(operation), *sorted(operation.results)])
        for operation in contents.operations
        if operation.name not in {"constant", "output"}
    )
    return dict(sorted(found.items()))


def label(operation: Operation) -> str:
    return operation.name if operation.graph == FUNCTION else f"{operation.graph}/{operation.name}"
