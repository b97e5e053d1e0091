"""The types that an ONNX file computes in and stores its weights in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError
from castling_deploy.export.attesting import attestation
from castling_deploy.export.onnx_graphs import every_constant, every_graph, every_node
from castling_deploy.export.onnx_types import inferred
from castling_deploy.target import Artifact, Attestation, Precision

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def attest(path: Path, artifact: Artifact, precision: Precision, problems: tuple[str, ...] = ()) -> Attestation:
    """What `path` says: types follow from its initialisers, inputs and casts, not from what it declares about them.

    Raises ExportError for a file that cannot be read or is not well typed.
    """
    import onnx

    model = loaded(path)
    model.graph.ClearField("value_info")
    types = dtypes(inferred(model))
    nodes = list(every_node(model.graph))
    operations = Counter(types[node.output[0]] for node in nodes if node.output[0] in types)
    quantised = dequantised(model.graph)
    products: Counter[str] = Counter()
    for node in nodes:
        if node.op_type in PRODUCTS:
            products["int8" if node.input[1] in quantised else types[node.output[0]]] += 1
    weights: Counter[str] = Counter()
    for tensor in every_constant(model.graph):
        array = onnx.numpy_helper.to_array(tensor)
        weights[array.dtype.name] += array.nbytes // (2 if array.dtype.name == "int4" else 1)
    inputs, outputs = (
        {
            value.name: (
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        }
        for values in (model.graph.input, model.graph.output)
    )
    return attestation(
        artifact,
        precision,
        products,
        operations,
        weights,
        problems,
        {entry.key: entry.value for entry in model.metadata_props},
        inputs=inputs,
        outputs=outputs,
        details=contents(model),
    )


def loaded(path: Path) -> onnx.ModelProto:
    """The model in the file `path`. Raises ExportError where it cannot be read."""
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # FileNotFoundError, protobuf's DecodeError, ValidationError
        raise ExportError(f"{path.name} cannot be read: {error}", hint="export the network again") from error


def dequantised_constants(path: Path) -> list[npt.NDArray[np.floating]]:
    """What the initialisers in levels of the file `path` stand for, the axis of C_out first, as ONNX defines it.

    Raises ExportError.
    """
    import numpy as np
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = loaded(path)
    found = []
    for graph in every_graph(model.graph):
        known = {tensor.name: tensor for tensor in (*model.graph.initializer, *graph.initializer)}
        nodes = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in known]
        read = {name: known[name] for node in nodes for name in node.input if name in known}
        made = [onnx.ValueInfoProto(name=node.output[0]) for node in nodes]
        alone = onnx.helper.make_graph(nodes, graph.name, [], made, list(read.values()))
        whole = onnx.helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
        try:
            values = ReferenceEvaluator(whole).run(None, {})
        except Exception as error:  # whatever onnx raises for scales that do not fit their levels
            raise ExportError(f"the levels of {path.name} cannot be read: {error}") from error
        for node, each in zip(nodes, values, strict=True):
            attributes = {item.name: item.i for item in node.attribute}
            axis = attributes.get("axis", 1)
            place = 1 - axis if attributes.get("block_size") else axis  # groups: that of C_in
            found.append(np.moveaxis(each, place, 0))
    return found


def contents(model: onnx.ModelProto) -> dict[str, Any]:
    """What the report says of a graph beside its types."""
    import onnx

    nodes = Counter(node.op_type for node in every_node(model.graph))
    found: dict[str, Any] = {"opset": model.opset_import[0].version, "nodes": dict(sorted(nodes.items()))}
    for kind, operator, place in (("activations", "QuantizeLinear", 2), ("weights", "DequantizeLinear", 0)):
        named = {
            name
            for node in every_node(model.graph)
            if node.op_type == operator
            for name in node.input[place : place + 1]
        }
        types = {tensor.data_type for tensor in every_constant(model.graph) if tensor.name in named}
        if types:
            found[kind] = sorted(onnx.helper.tensor_dtype_to_np_dtype(dtype).name for dtype in types)
    return found


def dequantised(graph: onnx.GraphProto) -> set[str]:
    """What is stored in levels, or passes through them."""
    return {name for node in every_node(graph) if node.op_type == "DequantizeLinear" for name in node.output}


def dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """numpy's name for the dtype of every value of an inferred model."""
    import onnx

    return {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        for graph in every_graph(model.graph)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
