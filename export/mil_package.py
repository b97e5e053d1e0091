"""What an .mlpackage holds, read from its own files: features, MIL program, weights.

The protobuf messages are coremltools' generated classes. Everything else is read here, the weight file included (MIL's
blob storage, version 2: MILBlob/Blob/StorageFormat.hpp of apple/coremltools), so that neither the converter's own
reader nor libcoremlpython takes part: what is looked at is what lies on the disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castling_deploy.errors import ExportError
from castling_deploy.export.coremltools_parts import messages

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Constant = npt.NDArray[np.generic] | str | list[str | int]

# MIL's names of dtypes -> numpy's, and the number of each in the weight file
NUMPY = {
    "BOOL": "bool",
    "FLOAT16": "float16",
    "FLOAT32": "float32",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
}
BLOB_DTYPES = {"FLOAT16": 1, "FLOAT32": 2, "UINT8": 3, "INT8": 4, "INT16": 6, "UINT16": 7, "INT32": 14, "UINT32": 15}
CONSTEXPR = "constexpr_"  # begins the types of what makes constants of constants, before the program runs
BLOB_SENTINEL = 0xDEADBEEF
HEADER = struct.Struct("<IIQQ")  # of one weight: sentinel, dtype, bytes, where they start; version 2 of the format


@dataclass(frozen=True)
class Declared:
    """The type a program gives to a value: MIL's dtype ("DICTIONARY" for one), shape with None where it is open."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Operation:
    """One step of a program; `inputs` are names of values per parameter (several for a variadic one)."""

    name: str
    type: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[Declared, ...]


@dataclass(frozen=True)
class Feature:
    """An input or output as an app sees it. `shape` of an image is (1, H, W, C); `colours` is its channel order."""

    name: str
    kind: Literal["tensor", "image", "label", "scores"]
    dtype: str
    shape: tuple[int, ...] = ()
    colours: str = ""


@dataclass(frozen=True)
class Package:
    """A single-function ML Program with everything it refers to."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    arguments: tuple[Declared, ...]
    results: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[str, Constant]
    specification_version: int
    metadata: Mapping[str, str]

    def dtype(self, constant: str) -> str:
        """MIL's name for the dtype of a constant; "STRING" for text and lists of it."""
        value = self.constants[constant]
        return "STRING" if isinstance(value, (str, list)) else value.dtype.name.upper()

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of a classifier in the order of its probabilities; none where it is no classifier."""
        for operation in self.operations:
            if operation.type == "classify":
                return tuple(str(label) for label in self.constants[operation.inputs["classes"][0]])
        return ()


def read_package(path: Path) -> Package:
    """Read `path`, a saved ML Program. Raises ExportError where it is none, or holds what cannot be read."""
    Model_pb2 = messages("Model_pb2")

    model, source = Model_pb2.Model(), model_file(path)
    try:
        model.ParseFromString(source.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose module has no type stubs
        raise ExportError(f"{path.name}/{source.name} is damaged: {error}") from error
    if model.WhichOneof("Type") != "mlProgram" or list(model.mlProgram.functions) != ["main"]:
        raise ExportError(f"{path.name} is not an ML Program of one function")
    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    constants: dict[str, Constant] = {}
    operations = []
    for message in block.operations:
        if message.blocks:
            raise ExportError(f"{path.name} has control flow ({message.type}), which is not read here")
        if message.type == "const":
            constants[message.outputs[0].name] = _value(message.attributes["val"], source.parent)
        else:
            operation, literals = _operation(message, source.parent)
            operations.append(operation)
            constants.update(literals)
    described = model.description
    return Package(
        inputs=tuple(_feature(feature) for feature in described.input),
        outputs=tuple(_feature(feature) for feature in described.output),
        arguments=tuple(_declared(argument) for argument in function.inputs),
        results=tuple(block.outputs),
        operations=tuple(operations),
        constants=constants,
        specification_version=model.specificationVersion,
        metadata=dict(described.metadata.userDefined),
    )


def model_file(path: Path) -> Path:
    """The protobuf inside the package `path`. Raises ExportError."""
    try:
        manifest = json.loads((path / "Manifest.json").read_text())
        source = path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is no .mlpackage: {error}") from error
    if not source.is_file():
        raise ExportError(f"{path} names a model file that is not there: {source.name}")
    return source


def _operation(message: Any, folder: Path) -> tuple[Operation, dict[str, Constant]]:
    """An operation, and the constants that it holds itself instead of naming them."""
    outputs = tuple(_declared(output) for output in message.outputs)
    names = message.attributes["name"].immediateValue.tensor.strings.values
    name = names[0] if names else outputs[0].name
    # what makes a constant of constants (constexpr_...) has them as attributes, not as arguments
    held = {key: value for key, value in sorted(message.attributes.items()) if key != "name"}
    inputs: dict[str, tuple[str, ...]] = {parameter: (f"{name}.{parameter}",) for parameter in held}
    literals = {f"{name}.{parameter}": _value(value, folder) for parameter, value in held.items()}
    for parameter, argument in sorted(message.inputs.items()):
        inputs[parameter] = tuple(
            binding.name or f"{name}.{parameter}.{index}" for index, binding in enumerate(argument.arguments)
        )
        literals.update(
            {
                key: _value(binding.value, folder)
                for key, binding in zip(inputs[parameter], argument.arguments, strict=True)
                if not binding.name
            }
        )
    return Operation(name, message.type, inputs, outputs), literals


def _declared(message: Any) -> Declared:
    MIL_pb2 = messages("MIL_pb2")

    match message.type.WhichOneof("type"):
        case "tensorType":
            tensor = message.type.tensorType
            shape = tuple(size.constant.size if size.HasField("constant") else None for size in tensor.dimensions)
            return Declared(message.name, MIL_pb2.DataType.Name(tensor.dataType), shape)
        case "dictionaryType":
            return Declared(message.name, "DICTIONARY")
        case other:
            raise ExportError(f"value {message.name} has a type that is not read here: {other}")


def _feature(message: Any) -> Feature:
    FeatureTypes_pb2 = messages("FeatureTypes_pb2")

    match message.type.WhichOneof("Type"):
        case "multiArrayType":
            array = message.type.multiArrayType
            dtype = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name(array.dataType)
            return Feature(message.name, "tensor", NUMPY.get(dtype, dtype), tuple(array.shape))
        case "imageType":
            image = message.type.imageType
            colours = FeatureTypes_pb2.ImageFeatureType.ColorSpace.Name(image.colorSpace)
            channels = 1 if colours == "GRAYSCALE" else 3
            return Feature(message.name, "image", "uint8", (1, image.height, image.width, channels), colours)
        case "stringType":
            return Feature(message.name, "label", "str")
        case "dictionaryType":
            return Feature(message.name, "scores", "float32")
        case other:
            raise ExportError(f"feature {message.name} has a type that is not read here: {other}")


def _value(message: Any, folder: Path) -> Constant:
    import numpy as np

    MIL_pb2 = messages("MIL_pb2")

    if message.type.WhichOneof("type") == "listType":
        return [_value(item, folder) for item in message.immediateValue.list.values]  # type: ignore[misc]
    dtype = MIL_pb2.DataType.Name(message.type.tensorType.dataType)
    shape = tuple(size.constant.size for size in message.type.tensorType.dimensions)
    if message.WhichOneof("value") == "blobFileValue":
        return _blob(folder, message.blobFileValue, dtype, shape)
    tensor = message.immediateValue.tensor
    values = getattr(tensor, tensor.WhichOneof("value")).values
    if dtype == "STRING":
        return str(values[0])
    if dtype not in NUMPY:
        raise ExportError(f"a constant of dtype {dtype} is not read here")
    if isinstance(values, bytes):  # float16 and the small integers
        return np.frombuffer(values, NUMPY[dtype]).reshape(shape)
    return np.array(list(values), NUMPY[dtype]).reshape(shape)


def _blob(folder: Path, message: Any, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    import numpy as np

    file = (folder / message.fileName.removeprefix("@model_path/")).resolve()
    if not file.is_relative_to(folder.resolve()) or dtype not in BLOB_DTYPES:
        raise ExportError(f"a weight of dtype {dtype} in {message.fileName} is not read here")
    with file.open("rb") as stream:
        stream.seek(message.offset)
        header = stream.read(HEADER.size).ljust(HEADER.size, b"\0")
        *kind, offset = HEADER.unpack(header)
        stream.seek(offset)
        values = np.fromfile(stream, NUMPY[dtype], math.prod(shape))
    if kind != [BLOB_SENTINEL, BLOB_DTYPES[dtype], values.nbytes] or values.size != math.prod(shape):
        raise ExportError(
            f"{file.name} holds no {dtype} weight of shape {shape} at byte {message.offset}",
            hint="the package is damaged: export it again",
        )
    return values.reshape(shape)
