"""Runs a saved Core ML program without Core ML: the path of an .mlpackage in, a callable out.

    program = load_program(Path("model.mlpackage"))
    logits = program({"image": image})["logits"]

The files of the package are read by `mil_package`, its operations run over torch (`mil_ops`), and the storage that the
program declares is honoured: every result is rounded to its declared dtype, and has to have its declared shape. How an
accelerator adds up inside an operation no program says; `accumulate` and `flush_subnormals` bracket that. This is a
reference, not Apple's runtime.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castling_deploy.errors import ExportError, ShapeError, UsageError
from castling_deploy.export.binary16 import SMALLEST_NORMAL
from castling_deploy.export.mil_ops import operations
from castling_deploy.export.mil_package import CONSTEXPR, NUMPY, Declared, Feature, Operation, Package, read_package
from castling_deploy.export.mil_shape_ops import UnsupportedOpError
from castling_deploy.export.mil_sums import Float16Sums, Float32Sums

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from castling_deploy.export.mil_shape_ops import Table

    Output = npt.NDArray[np.generic] | str | int | dict[str | int, float]

VARIADIC = "values"  # the one parameter that takes several values


def load_program(
    path: Path, *, accumulate: Literal["float32", "float16"] = "float32", flush_subnormals: bool = False
) -> Program:
    """The program of the package at `path`, checked and ready to run.

    `accumulate` is where an operation of float16 type keeps its running sums; `flush_subnormals` makes float16 values
    and constants below 2**-14 zero. Operations of float32 type are left alone by both.
    Raises UnsupportedOpError, naming every operation and parameter that is not covered, ExportError where the package
    cannot be read or contradicts itself, UsageError for another `accumulate`.
    """
    if accumulate not in ("float32", "float16"):
        raise UsageError(f"sums cannot be kept in '{accumulate}'", hint="use float32 or float16")
    return Program(read_package(path), accumulate, flush_subnormals)


@dataclass(frozen=True)
class Step:
    """An operation with its function; `parameters` are the ones it is given, in the function's own order."""

    operation: Operation
    function: Callable[..., Any]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation.type} '{self.operation.name}'"


class Program:
    """An ML Program that can be called. `counts` is how often it has each type of operation."""

    def __init__(self, package: Package, accumulate: Literal["float32", "float16"], flush_subnormals: bool) -> None:
        _refuse_contradictions(package)
        self.package, self._flush = package, flush_subnormals
        self.counts = Counter(operation.type for operation in package.operations)
        wide = operations(Float32Sums())
        self._steps = _steps(package, wide, operations(Float16Sums()) if accumulate == "float16" else wide)
        self._constants = {name: self._stored(constant) for name, constant in package.constants.items()}

    def __call__(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Output]:
        """Inputs by name to outputs by name, in the shapes and dtypes of the features. Raises ShapeError, ExportError.

        An image is uint8 (1, H, W, C), red first. A classifier's label is a string, its scores are a dictionary in
        the order of its classes.
        """
        import torch

        features = {feature.name: feature for feature in self.package.inputs}
        if set(inputs) != set(features):
            raise ShapeError(f"inputs {sorted(inputs)} where {sorted(features)} are needed")
        values = dict(self._constants)
        with torch.inference_mode():
            for declared in self.package.arguments:
                values[declared.name] = _argument(features[declared.name], declared, inputs[declared.name])
            for step in self._steps:
                for declared, value in zip(step.operation.outputs, self._run(step, values), strict=True):
                    values[declared.name] = value
        return {feature.name: _output(values[feature.name]) for feature in self.package.outputs}

    def made_constants(self) -> list[npt.NDArray[np.floating]]:
        """What the program's constants in levels or look-up tables stand for, in its order. Raises ExportError."""
        made = (step for step in self._steps if step.operation.type.startswith(CONSTEXPR))
        return [value.numpy() for step in made for value in self._run(step, self._constants)]

    def _run(self, step: Step, values: Mapping[str, Any]) -> list[Any]:
        import torch

        arguments: dict[str, Any] = {}
        dtype = None  # of the first operand that is a float
        for parameter in step.parameters:
            operands = [values[name] for name in step.operation.inputs[parameter]]
            floats = [x.dtype for x in operands if isinstance(x, torch.Tensor) and x.is_floating_point()]
            dtype = dtype or (floats[0] if floats else None)
            operands = [_widened(operand) for operand in operands]
            arguments[parameter] = operands if parameter == VARIADIC else operands[0]
        try:
            result = step.function(**arguments)
        except UnsupportedOpError as error:
            raise UnsupportedOpError(f"{step}: {error.message}") from error
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ExportError(f"{step} cannot be computed: {error}") from error
        results = list(result) if isinstance(result, tuple) else [result]
        if len(results) != len(step.operation.outputs):
            raise ExportError(f"{step} gives {len(results)} values, {len(step.operation.outputs)} are declared")
        if dtype is not None and step.operation.type != "cast":
            results = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in results]
        for declared, value in zip(step.operation.outputs, results, strict=True):
            if not _is(declared, value):
                raise ExportError(
                    f"{step} gives {_described(value)}, the program declares {declared.dtype} {declared.shape}"
                )
        return [self._flushed(value) for value in results]

    def _stored(self, constant: Any) -> Any:
        import numpy as np
        import torch

        return self._flushed(torch.from_numpy(np.array(constant))) if isinstance(constant, np.ndarray) else constant

    def _flushed(self, value: Any) -> Any:
        import torch

        if not self._flush or not isinstance(value, torch.Tensor) or value.dtype != torch.float16:
            return value
        return torch.where(value.abs() < SMALLEST_NORMAL, torch.zeros_like(value), value)


def _steps(package: Package, wide: Table, narrow: Table) -> list[Step]:
    """The operations with their functions, those that give float16 from `narrow`. Raises UnsupportedOpError."""
    steps, unknown = [], []
    for operation in package.operations:
        function = (narrow if operation.outputs[0].dtype == "FLOAT16" else wide).get(operation.type)
        known = list(inspect.signature(function).parameters) if function is not None else []
        foreign = [parameter for parameter in operation.inputs if parameter not in known]
        if function is None:
            unknown.append(f"{operation.type} ('{operation.name}')")
        elif foreign:
            unknown.append(f"{operation.type} with {', '.join(foreign)} ('{operation.name}')")
        else:
            steps.append(Step(operation, function, tuple(name for name in known if name in operation.inputs)))
    if unknown:
        raise UnsupportedOpError(
            f"operations that the evaluator lacks: {'; '.join(unknown)}",
            hint="run the package on macOS, where coremltools predicts with Core ML itself",
        )
    return steps


def _refuse_contradictions(package: Package) -> None:
    """Raises ExportError unless the features are the program's own, in its dtypes, and values are made before used."""
    arguments = [declared.name for declared in package.arguments]
    for features, names in ((package.inputs, arguments), (package.outputs, list(package.results))):
        if sorted(feature.name for feature in features) != sorted(names):
            raise ExportError(f"features {[feature.name for feature in features]} are not the program's own: {names}")
    known = {name: package.dtype(name) for name in package.constants}
    known |= {declared.name: declared.dtype for declared in package.arguments}
    for operation in package.operations:
        for name in (name for names in operation.inputs.values() for name in names):
            if name not in known:
                raise ExportError(f"{operation.type} '{operation.name}' uses '{name}', which nothing before it makes")
        known |= {declared.name: declared.dtype for declared in operation.outputs}
    for feature in (*package.inputs, *package.outputs):
        if feature.kind == "tensor" and feature.dtype != NUMPY.get(known.get(feature.name, "")):
            raise ExportError(f"feature '{feature.name}' is {feature.dtype}, in the program {known.get(feature.name)}")


def _argument(feature: Feature, declared: Declared, array: npt.NDArray[np.generic]) -> torch.Tensor:
    import numpy as np
    import torch

    if array.dtype != feature.dtype or array.shape != feature.shape:
        raise ShapeError(
            f"input '{feature.name}' is {array.dtype} {array.shape} where {feature.dtype} {feature.shape} is needed"
        )
    value = torch.from_numpy(np.array(array))
    if feature.kind != "image":
        return value
    value = value.flip(-1) if feature.colours == "BGR" else value
    return value.permute(0, 3, 1, 2).to(getattr(torch, NUMPY[declared.dtype]))  # the pixels as they are, 0 to 255


def _widened(value: Any) -> Any:
    import torch

    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value


def _is(declared: Declared, value: Any) -> bool:
    import torch

    if isinstance(value, dict):
        return declared.dtype == "DICTIONARY"
    if not isinstance(value, torch.Tensor):
        return declared.dtype == ("STRING" if isinstance(value, str) else "INT64")
    return (
        str(value.dtype) == f"torch.{NUMPY.get(declared.dtype)}"
        and value.dim() == len(declared.shape)
        and all(wanted in (None, size) for wanted, size in zip(declared.shape, value.shape, strict=True))
    )


def _described(value: Any) -> str:
    import torch

    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _output(value: Any) -> Any:
    import torch

    return value.numpy() if isinstance(value, torch.Tensor) else value
