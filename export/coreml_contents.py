"""What a Core ML package holds, read from it alone: for the report on an export, and for whoever attests it later."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

from castling_deploy.export.binary16 import SMALLEST_NORMAL
from castling_deploy.export.coreml_package import distinct
from castling_deploy.export.mil_package import CONSTEXPR, Package
from castling_deploy.export.neural_engine import Step, Value, note, unfit

DEQUANTISE, LOOK_UP = "constexpr_affine_dequantize", "constexpr_lut_to_dense"
PRODUCTS = frozenset({"conv", "conv_transpose", "einsum", "linear", "matmul"})


def product_types(package: Package) -> Counter[str]:
    """How many products there are by the dtype that they compute in, or "int8" where their weights are, or are looked
    up by as many bits or fewer."""
    narrow = {
        operation.outputs[0].name
        for operation in package.operations
        if operation.type == LOOK_UP
        or (operation.type == DEQUANTISE and package.dtype(operation.inputs["quantized_data"][0]) == "INT8")
    }
    return Counter(
        "int8" if not narrow.isdisjoint(operation.inputs.get("weight", ())) else operation.outputs[0].dtype.lower()
        for operation in package.operations
        if operation.type in PRODUCTS
    )


def look_up_tables(package: Package) -> dict[str, int]:
    """How many weights are in look-up tables, by the bits of an index."""
    tables = (package.constants[one.inputs["lut"][0]] for one in package.operations if one.type == LOOK_UP)
    return dict(Counter(str(len(table).bit_length() - 1) for table in tables))


def contained(package: Package) -> dict[str, Any]:
    """What the report says that stands in the package itself.

    `subnormal_weights` is the share of float16 weights between 0 and 2**-14, which a device may take for zero.
    """
    import numpy as np

    halves: list[np.ndarray[Any, Any]] = [
        np.abs(value)
        for value in package.constants.values()
        if isinstance(value, np.ndarray) and value.dtype == np.float16
    ]
    running = steps(package)
    unsuited = unfit(running)
    small = sum(int(((value > 0) & (value < SMALLEST_NORMAL)).sum()) for value in halves)
    total = sum(value.size for value in halves)
    return {
        "specification_version": package.specification_version,
        "subnormal_weights": round(small / total, 6) if total else None,
        "operations": dict(sorted(Counter(operation.type for operation in package.operations).items())),
        "look_up_tables": look_up_tables(package),
        "unfit_for_the_neural_engine": unsuited,
        "notes": note(unsuited, len(running)),
    }


def steps(package: Package) -> list[Step]:
    """The operations that run, in order."""
    return [
        Step(
            operation.name,
            operation.type,
            tuple(chain.from_iterable(operation.inputs.values())),
            tuple(Value(output.name, output.dtype.lower(), output.shape) for output in operation.outputs),
        )
        for operation in package.operations
        if not operation.type.startswith(CONSTEXPR)
    ]


def outputs_of(package: Package) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every output that is numbers, as the features and the program declare them together.

    A classifier's `label` is a text; its dictionary has a number per class.
    """
    shapes = {
        value.name: tuple(-1 if size is None else size for size in value.shape)
        for operation in package.operations
        for value in operation.outputs
    }
    return {
        feature.name: (
            feature.dtype,
            (1, len(package.classes)) if feature.kind == "scores" else shapes.get(feature.name, feature.shape),
        )
        for feature in package.outputs
        if feature.kind != "label"
    }


def classifier_problems(package: Package) -> list[str]:
    """What is wrong where a classifier's own labels are not those among its facts."""
    stated = json.loads(package.metadata.get("labels", "null"))
    if not package.classes or package.classes == distinct(stated or ()):
        return []
    return ["the classifier's labels are not those among the facts in the file"]
