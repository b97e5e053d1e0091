"""What is in an ONNX graph, and in those inside: what `Scan` repeats is one of its own, which may read around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Clip", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Erf"}
    | {"Gelu", "HardSwish", "HardSigmoid", "Sigmoid", "Relu", "Tanh"}
)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside `node`."""
    for item in node.attribute:
        if item.HasField("g"):
            yield item.g


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and all graphs inside."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from every_graph(body)


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The values around `node` that it reads, those of its bodies included."""
    yield from (name for name in node.input if name)
    for body in bodies(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own.update(name for inner in body.node for name in inner.output)
        yield from (name for inner in body.node for name in read_by(inner) if name not in own)


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of `graph` and of all graphs inside."""
    for each in every_graph(graph):
        yield from each.node


def every_constant(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initialisers of `graph` and of all graphs inside."""
    for each in every_graph(graph):
        yield from each.initializer


def shapes_of(graph: onnx.GraphProto) -> dict[str, Shape]:
    """The shapes of all values that `graph` declares, 0 for an open axis, and of its constants."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
    return shapes


def without_unread(graph: onnx.GraphProto) -> None:
    """Removes constants that nothing reads, in place."""
    read = {name for node in graph.node for name in read_by(node)}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def integers(name: str, values: Iterable[int]) -> onnx.TensorProto:
    """A shape, or axes, or pads."""
    import numpy as np
    import onnx

    return onnx.numpy_helper.from_array(np.array(list(values), np.int64), name)
