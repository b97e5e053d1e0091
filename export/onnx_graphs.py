"""ONNX graphs inside graphs: what `Scan` repeats is a graph of its own, which may read what stands around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


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
