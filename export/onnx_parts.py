"""Tokens in parts: what a graph computes of every token alone, it computes of some hundred tokens at a time. Exact.

A large image has more tokens than a core's cache holds: of Castling-DeiT-T at 1024 pixels (4097 tokens, 13 MB between
the two Linears of an MLP) the products with the weights run at 46 billion multiply-accumulates a second, at 224 pixels
at 58. Here everything between two operators that need all tokens (k^T u and the token convolution) is the body of one
`Scan`: the same operators and weights, 241 tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from castling_deploy.errors import ExportError
from castling_deploy.export.onnx_graphs import Shape, integers, read_by, without_unread
from castling_deploy.export.onnx_tokens import Region, Tokens

if TYPE_CHECKING:
    import onnx

SMALLEST = 4  # a part holds no less than a fourth of what it may: every part costs the start of its operators


def in_parts(model: onnx.ModelProto, at_once: int) -> onnx.ModelProto:
    """`model`, whose tensors all have static shapes, with no more than `at_once` tokens at a time, in place; shapes
    between its operators are to be inferred again. Raises ExportError for a number of tokens without such a divisor.
    """
    parting = _Parting(model.graph, at_once)
    nodes = in_order(list(parting.nodes()))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(parting.made.values())
    without_unread(model.graph)
    return model


def part_of(tokens: int, at_once: int) -> int:
    """The largest part of at most `at_once` tokens that divides `tokens`. Raises ExportError where it is small."""
    sizes = [size for size in range(1, tokens + 1) if tokens % size == 0]
    best = max(size for size in sizes if size <= at_once)
    if best * SMALLEST < min(at_once, tokens):
        larger = min(size for size in sizes if size > best)
        raise ExportError(
            f"{tokens} tokens cannot be split into equal parts of {-(-at_once // SMALLEST)} to {at_once}",
            hint=f"use --tokens-at-once {larger}, another size of the image, or leave it out",
        )
    return best


class _Parting:
    """`graph` with a `Scan` for every region that has too many tokens; `made` are the constants that it needs."""

    def __init__(self, graph: onnx.GraphProto, at_once: int) -> None:
        self.tokens = tokens = Tokens(graph)
        self.bodies: list[_Body] = []
        self.made: dict[str, onnx.TensorProto] = {}
        self.whole = list(tokens.whole)
        for region in tokens.regions:
            if region.tokens > at_once and tokens.multiplies(region):
                self.bodies.append(_Body(tokens, region, part_of(region.tokens, at_once)))
            else:
                self.whole += region.nodes
        self.needed = {value.name for value in graph.output}  # of what is made, outside of the bodies
        self.needed.update(name for node in self.whole for name in node.input)
        self.needed.update(name for body in self.bodies for name in (*body.parts, *body.states))
        for name, node in reversed(tokens.movable.items()):
            if name in self.needed:
                self.needed.update(node.input)

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """All of them, in any order."""
        yield from self.whole
        yield from (node for name, node in self.tokens.movable.items() if name in self.needed)
        for body in self.bodies:
            yield from self._scan(body)

    def _scan(self, body: _Body) -> Iterator[onnx.NodeProto]:
        """One `Scan`, and around it what splits tokens into parts and joins them."""
        import onnx

        made = [name for node in body.region.nodes for name in node.output if name in self.needed]
        for name in body.parts:
            yield from self._split(name, body.size)
        yield onnx.helper.make_node(
            "Scan",
            [*body.states, *(f"{name}/of{body.size}" for name in body.parts)],
            [*(f"{made[0]}/{name}/last" for name in body.states), *(f"{name}/parts" for name in made)],
            name=f"{body.region.nodes[0].name}/tokens",
            body=body.graph(made),
            num_scan_inputs=len(body.parts),
        )
        for name in made:
            yield from self._join(name)

    def _split(self, name: str, size: int) -> Iterator[onnx.NodeProto]:
        """(..., N, ...) -> (N / n, ..., n, ...)."""
        shape, place, parts = self.tokens.shapes[name], self.tokens.place(name), f"{name}/of{size}"
        if f"{parts}/shape" in self.made:  # another region reads it too
            return
        split = (*shape[:place], shape[place] // size, size, *shape[place + 1 :])
        first = parts if place == 0 else f"{parts}/within"
        yield self._reshape(name, first, parts, split)
        if place:
            yield transposed(first, parts, (place, *range(place), *range(place + 1, len(split))))

    def _join(self, name: str) -> Iterator[onnx.NodeProto]:
        """(N / n, ..., n, ...) -> (..., N, ...)."""
        shape, place, parts = self.tokens.shapes[name], self.tokens.place(name), f"{name}/parts"
        if place:
            within = f"{parts}/within"
            yield transposed(parts, within, (*range(1, place + 1), 0, *range(place + 1, len(shape) + 1)))
            parts = within
        yield self._reshape(parts, name, f"{name}/whole", shape)

    def _reshape(self, given: str, made: str, label: str, shape: Shape) -> onnx.NodeProto:
        import onnx

        constant = f"{label}/shape"
        self.made[constant] = integers(constant, shape)
        return onnx.helper.make_node("Reshape", [given, constant], [made], name=f"{label}/Reshape")


class _Body:
    """A region, of `size` tokens: `parts` are read a part at a time, `states` are the same for all.

    ONNX lets a body read what stands around it. OpenVINO 2026.4 does so for constants alone: what the network computed
    of all tokens is handed on from part to part.
    """

    def __init__(self, tokens: Tokens, region: Region, size: int) -> None:
        self._tokens, self.region, self.size = tokens, region, size
        self.parts: list[str] = []
        self.states: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._here: set[str] = set()
        for node in region.nodes:
            self._take(node)

    def _take(self, node: onnx.NodeProto) -> None:
        import onnx

        for name in node.input:
            if name and name not in self._here and name not in self._tokens.constants:
                self._fetch(name)
        if node.op_type == "DequantizeLinear" and node.input[0] in self._tokens.constants:
            self._hold(node.input)
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        if node.op_type == "Reshape" and node.output[0] in self._tokens.axes:
            shape = integers(f"{part(node.output[0])}/shape", self._shape(node.output[0]))
            self._constants[shape.name] = shape
            twin.input[1] = shape.name
        self._here.update(node.output)
        twin.input[:] = [part(name) if name in self._here else name for name in twin.input]
        twin.output[:] = [part(name) for name in node.output]
        self._nodes.append(twin)

    def _hold(self, names: Iterable[str]) -> None:
        """A weight in levels, its scales and zeros: ONNX Runtime 1.32 takes them into a product of floats, and finds
        them in the graph of the product alone."""
        import onnx

        for name in names:
            own = self._constants[part(name)] = onnx.TensorProto()
            own.CopyFrom(self._tokens.constants[name])
            own.name = part(name)
            self._here.add(name)

    def _fetch(self, name: str) -> None:
        if name in self._tokens.movable:
            self._take(self._tokens.movable[name])
        else:
            (self.parts if name in self._tokens.axes else self.states).append(name)
            self._here.add(name)

    def _shape(self, name: str) -> Shape:
        """Of one part."""
        shape = list(self._tokens.shapes[name])
        if name in self._tokens.axes:
            shape[self._tokens.axes[name]] = self.size
        return tuple(shape)

    def graph(self, made: Iterable[str]) -> onnx.GraphProto:
        """The states and the parts -> the states and the parts that were made."""
        import onnx

        def typed(name: str, as_name: str) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(as_name, self._tokens.types[name], self._shape(name))

        kept = [
            onnx.helper.make_node("Identity", [part(name)], [f"{part(name)}/kept"], name=f"{part(name)}/Identity")
            for name in self.states
        ]
        return onnx.helper.make_graph(
            [*self._nodes, *kept],
            "tokens",
            [typed(name, part(name)) for name in (*self.states, *self.parts)],
            [
                *(typed(name, f"{part(name)}/kept") for name in self.states),
                *(typed(name, part(name)) for name in made),
            ],
            list(self._constants.values()),
        )


def part(name: str) -> str:
    """What a value is called inside a body."""
    return f"{name}/part"


def transposed(given: str, made: str, order: Iterable[int]) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node("Transpose", [given], [made], name=f"{made}/Transpose", perm=list(order))


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """`nodes`, each behind those that make what it reads."""
    maker = {name: index for index, node in enumerate(nodes) for name in node.output}
    before = {index: [maker[name] for name in read_by(node) if name in maker] for index, node in enumerate(nodes)}
    return [nodes[index] for index in TopologicalSorter(before).static_order()]
