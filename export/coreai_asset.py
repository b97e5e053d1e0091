"""An .aimodel folder: written the same way every time, and read back for what is in it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castling_deploy.errors import ExportError
from castling_deploy.export.coreai_program import FUNCTION

PROGRAM, DIGEST, METADATA = "main.mlirb", "main.hash", "metadata.json"
MAGIC = b"ML\xefR"  # of MLIR's bytecode
OURS = "castling"  # the key of our facts in the metadata that a creator may define
FLOATS = {"f16": "float16", "f32": "float32", "bf16": "bfloat16", "f64": "float64"}  # MLIR's names, and numpy's
PARAMETRISED = frozenset({"coreai.interpolate"})  # takes its scale and offset as float32 constants, whatever it scales


@dataclass(frozen=True)
class Operation:
    """One operation of a program: `graph` is the function or the composite it stands in, without its number.

    `floats` are the floating-point types of its operands and results by numpy's names; those of the results are
    `results`.
    """

    graph: str
    name: str
    floats: frozenset[str]
    results: frozenset[str]


@dataclass(frozen=True)
class AssetContents:
    """What a saved asset holds. Inputs and outputs are (name, MLIR type)."""

    operations: tuple[Operation, ...]
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    metadata: Mapping[str, Any]


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


def read_asset(path: Path) -> AssetContents:
    """What the asset on disk holds. Raises ExportError for a damaged one."""
    from coreai.authoring import AIModelAsset

    require_whole(path)
    try:
        module: Any = AIModelAsset.load(path).program._module._mlir_module
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"coreai does not read {path.name}: {error}", hint="export the network again") from error
    (function,) = (found for found in module.body.operations if found.attributes["sym_name"].value == FUNCTION)
    kind = function.attributes["function_type"].value
    inputs = named(function.attributes["arg_attrs"], kind.inputs)
    outputs = named(function.attributes["res_attrs"], kind.results)
    operations = tuple(operations_of(module.operation, ""))
    metadata = json.loads((path / METADATA).read_text())
    return AssetContents(operations, inputs, outputs, metadata)


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
                yield Operation(graph, name, floats(inner.operands) | results, results)
                yield from operations_of(inner, graph)


def composite(name: str) -> str:
    """layer_norm_3 is a layer_norm."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else name


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
