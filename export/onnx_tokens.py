"""What an ONNX graph computes of every token alone, and where it needs several at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from castling_deploy.export.onnx_graphs import ELEMENTWISE, shapes_of

if TYPE_CHECKING:
    import onnx

LINEARS = frozenset({"Gemm", "MatMul"})
NORMS = frozenset({"LayerNormalization", "LpNormalization"})
VIEWS = frozenset({"Reshape", "Transpose"})


@dataclass
class Region:
    """Operators that are computed of every token alone, with nothing between them that needs all tokens."""

    tokens: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)


class Tokens:
    """What `graph`, whose tensors all have static shapes, computes of every token alone.

    `axes` are those of the tokens, counted from the end, of all values that have them. `regions` hold the operators of
    every token alone, `whole` those that need several or none, `movable` those that may be made again wherever they
    are read, by what they make.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes = shapes_of(graph)
        values = (*graph.input, *graph.value_info, *graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.fixed = set(self.constants)  # and what hangs on them alone
        self.axes: dict[str, int] = {}
        self.movable: dict[str, onnx.NodeProto] = {}
        self.whole: list[onnx.NodeProto] = []
        stages: dict[str, int] = {}  # how often several tokens were needed at once before a value
        found: dict[tuple[int, int], Region] = {}
        for node in graph.node:
            axis = self._token_axis(node)
            stage = max((stages.get(name, 0) for name in node.input), default=0)
            if axis is not None:
                self.axes.update((name, axis) for name in node.output)
            else:
                stage += any(name in self.axes for name in node.input)
            stages.update((name, stage) for name in node.output)
            if self.fixed.issuperset(node.input):
                self.fixed.update(node.output)
            if self._is_movable(node):
                self.movable.update((name, node) for name in node.output)
            elif axis is None:
                self.whole.append(node)
            else:
                tokens = self.shapes[node.output[0]][axis]
                found.setdefault((stage, tokens), Region(tokens)).nodes.append(node)
        self.regions = list(found.values())

    def place(self, name: str) -> int:
        """The axis of the tokens, counted from the front."""
        return len(self.shapes[name]) + self.axes[name]

    def multiplies(self, region: Region) -> bool:
        """Whether there is a Linear in `region`."""
        return any(self._is_linear(node) for node in region.nodes)

    def _is_movable(self, node: onnx.NodeProto) -> bool:
        """Whether `node` may be made again wherever it is read: it says how tokens lie, or hangs on weights alone, or
        is what levels stand for, which runtimes take into the product that reads it."""
        placed = node.op_type in VIEWS and node.output[0] in self.axes
        return placed or self._is_levelled(node, "DequantizeLinear") or self.fixed.issuperset(node.output)

    def _is_levelled(self, node: onnx.NodeProto, kind: str) -> bool:
        """Whether one scale is for all of what `node`, of that `kind`, rounds or reads."""
        return node.op_type == kind and all(self.shapes[name] in ((), (1,)) for name in node.input[1:])

    def _is_linear(self, node: onnx.NodeProto) -> bool:
        """Whether `node` multiplies by a weight, in levels or not."""
        return node.op_type in LINEARS and self.fixed.issuperset(node.input[1:]) and not attribute(node, "transA")

    def _begin(self, name: str) -> None:
        """Tokens are before the last axis of `name`."""
        self.axes[name] = -2
        if name in self.movable:  # levels stand for it
            self.axes[self.movable[name].input[0]] = -2

    def _token_axis(self, node: onnx.NodeProto) -> int | None:
        """The axis of the tokens of what `node` makes of every token alone; None where it needs more than one, or no
        tokens are in it."""
        kind, (made, *_) = node.op_type, node.output
        first, rank = node.input[0], len(self.shapes[made])
        axis = self.axes.get(first)
        if kind in VIEWS:
            return None if axis is None else self._moved(node, axis)
        if kind in LINEARS and self._is_linear(node):
            if axis is None and rank >= 2 and first not in self.fixed:
                self._begin(first)
            return self.axes.get(first) if self.axes.get(first) == -2 else None
        if kind == "MatMul":
            return -2 if axis == -2 and node.input[1] not in self.axes else None
        if kind in NORMS and attribute(node, "axis", -1) in (-1, rank - 1) and rank >= 2:
            if axis is None and kind == "LayerNormalization":
                self._begin(first)
            axis = self.axes.get(first)
            return None if axis == -1 else axis
        if self._is_levelled(node, "DequantizeLinear"):
            return axis
        if kind in ELEMENTWISE or kind == "Cast" or self._is_levelled(node, "QuantizeLinear"):
            return self._shared(node)
        return None

    def _moved(self, node: onnx.NodeProto, axis: int) -> int | None:
        """Where a Reshape or a Transpose puts the axis; None where it is no axis afterwards."""
        given, made = self.shapes[node.input[0]], self.shapes[node.output[0]]
        place = len(given) + axis
        if node.op_type == "Transpose":
            return list(attribute(node, "perm")).index(place) - len(made)
        before, tokens = prod(given[:place]), given[place]
        places = [at for at, size in enumerate(made) if size == tokens and prod(made[:at]) == before]
        return places[0] - len(made) if places else None

    def _shared(self, node: onnx.NodeProto) -> int | None:
        """The axis of an elementwise operator: that of all its operands, but for those that are broadcast over it."""
        made = self.shapes[node.output[0]]
        known = {self.axes[name] for name in node.input if name in self.axes}
        if len(known) != 1:
            return None
        (axis,) = known
        others = [name for name in node.input if name and name not in self.axes]
        spread = [name for name in others if len(self.shapes[name]) < -axis or self.shapes[name][axis] == 1]
        tokens = [name for name in others if name not in spread]
        if any(name in self.fixed or self.shapes[name] != made for name in tokens):
            return None
        self.axes.update((name, axis) for name in tokens)
        return axis


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    import onnx

    found = [onnx.helper.get_attribute_value(item) for item in node.attribute if item.name == name]
    return found[0] if found else default
