"""A batch of one is no axis: the tensors of a fixed batch of one lose it between images and outputs. Exact.

ONNX Runtime takes a Linear on (N, C) as one Gemm; on (1, N, C) it puts a Reshape before and one behind, 146 of 446
nodes of Castling-DeiT-T, and takes a transposition of heads into a product (FusedMatMul) on (N, H, D) but not on
(1, N, H, D). Operators that need images (convolutions, pooling, resizing) keep theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from castling_deploy.eight_bits import FEW_ROWS
from castling_deploy.export.onnx_graphs import ELEMENTWISE, Shape, integers, shapes_of

if TYPE_CHECKING:
    import onnx

REDUCTIONS = frozenset({"ReduceL2", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceSumSquare"})


def unbatched(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, whose tensors all have static shapes, without the leading axis of 1 wherever an operator works without.

    Changes `model` in place and returns it; shapes between its operators are to be inferred again.
    """
    rewriting = _Rewriting(model)
    for node in list(model.graph.node):
        rewriting.take(node)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    nodes = without_detours(rewriting.nodes, rewriting.shapes, {value.name for value in model.graph.output})
    used = {name for node in nodes for name in node.input}
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensor for name, tensor in rewriting.constants.items() if name in used)
    return model


@dataclass
class _Rewriting:
    """The graph so far. `bare` holds the names of tensors that have lost their leading axis; `full` of those that have
    it too, under another name."""

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    bare: set[str] = field(default_factory=set)
    full: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes = shapes_of(graph)
        self.outputs = {value.name for value in graph.output}

    def take(self, node: onnx.NodeProto) -> None:
        """Adds `node`, without the axis where its operator works without, or else with it as it was."""
        inputs = self._without_axis(node) if self._may(node) else None
        if inputs is None:
            node.input[:] = [self._with_axis(name) for name in node.input]
        else:
            node.input[:] = inputs
            for name in node.output:
                self.bare.add(name)
                self.shapes[name] = self.shapes[name][1:]
        self.nodes.append(node)

    def _may(self, node: onnx.NodeProto) -> bool:
        """Whether every output has an axis of 1 to lose and two more, and stays inside the graph. A chain starts at a
        Linear or a Reshape: the activations between two convolutions gain nothing."""
        shapes = [self.shapes.get(name, ()) for name in node.output]
        if any(len(shape) < 3 or shape[0] != 1 for shape in shapes) or self.outputs.intersection(node.output):
            return False
        if any(len(shape) == 3 and shape[1] < FEW_ROWS for shape in shapes):
            return False
        starts = node.op_type in ("MatMul", "Reshape")
        return starts or not self.bare.isdisjoint(node.input)

    def _without_axis(self, node: onnx.NodeProto) -> list[str] | None:
        """The inputs of `node` once its axis is gone, its attributes changed; None where it needs the axis."""
        kind, rank = node.op_type, len(self.shapes[node.output[0]])
        first, *others = node.input
        if kind == "Reshape":
            return [first, self._integers(f"{node.output[0]}/shape", self.shapes[node.output[0]][1:])]
        if kind in ELEMENTWISE:
            return self._each(node.input, rank)
        if kind == "MatMul":
            weight = len(self.shapes[others[0]]) == 2 and others[0] in self.constants
            return [*self._each([first], rank), *(others if weight else self._each(others, rank))]
        if kind in ("LayerNormalization", "Softmax"):
            return [*self._each([first], rank), *others] if self._shift(node, "axis", rank, -1) else None
        if kind == "Transpose":
            return self._each([first], rank) if self._without_first(node) else None
        if kind in ("Concat", "Split"):
            return self._joined(node, rank)
        if kind in REDUCTIONS and others and self._read(others[0]) is not None:
            given = len(self.shapes[first]) + (first in self.bare)
            axes = [axis % given for axis in self._read(others[0]) or ()]
            if 0 in axes or not axes:
                return None
            return [*self._each([first], given), self._integers(f"{node.output[0]}/axes", [axis - 1 for axis in axes])]
        if kind == "Slice" and len(others) >= 3:
            axes = [axis % rank for axis in self._read(others[2]) or ()]
            if 0 in axes or not axes:
                return None
            shifted = self._integers(f"{node.output[0]}/axes", [axis - 1 for axis in axes])
            return [*self._each([first], rank), *others[:2], shifted, *others[3:]]
        if kind == "Pad" and len(others) <= 2:
            pads = self._read(others[0])
            if pads is None or pads[0] or pads[rank]:
                return None
            kept = [*pads[1:rank], *pads[rank + 1 :]]
            return [*self._each([first], rank), self._integers(f"{node.output[0]}/pads", kept), *others[1:]]
        return None

    def _joined(self, node: onnx.NodeProto, rank: int) -> list[str] | None:
        if not self._shift(node, "axis", rank, 0):
            return None
        if node.op_type == "Concat":
            return self._each(node.input, rank)
        return [*self._each(node.input[:1], rank), *node.input[1:]]

    def _each(self, names: Iterable[str], rank: int) -> list[str]:
        """The tensors without their leading axis; constants of a lower rank stay: they are broadcast from the right."""
        return [
            name if name in self.bare or len(self.shapes.get(name, ())) < rank else self._strip(name) for name in names
        ]

    def _strip(self, name: str) -> str:
        bare = f"{name}/row"
        if bare not in self.shapes:
            shape = self.shapes[name][1:]
            self.shapes[bare] = shape
            if name in self.constants:
                tensor = type(self.constants[name])()
                tensor.CopyFrom(self.constants[name])
                tensor.name, tensor.dims[:] = bare, shape
                self.constants[bare] = tensor
            else:
                self._reshape(name, bare, shape)
        return bare

    def _with_axis(self, name: str) -> str:
        if name not in self.bare:
            return name
        if name not in self.full:
            self.full[name] = full = f"{name}/batch"
            self.shapes[full] = (1, *self.shapes[name])
            self._reshape(name, full, self.shapes[full])
        return self.full[name]

    def _reshape(self, given: str, made: str, shape: Shape) -> None:
        import onnx

        constant = self._integers(f"{made}/shape", shape)
        self.nodes.append(onnx.helper.make_node("Reshape", [given, constant], [made], name=f"{made}/Reshape"))

    def _integers(self, name: str, values: Iterable[int]) -> str:
        self.constants[name] = integers(name, values)
        self.shapes[name] = tuple(self.constants[name].dims)
        return name

    def _read(self, name: str) -> list[int] | None:
        import onnx

        return [int(v) for v in onnx.numpy_helper.to_array(self.constants[name])] if name in self.constants else None

    @staticmethod
    def _shift(node: onnx.NodeProto, name: str, rank: int, default: int) -> bool:
        """Moves the axis that an attribute names, in place; False where it is the leading one."""
        import onnx

        found = [item for item in node.attribute if item.name == name]
        axis = (found[0].i if found else default) % rank
        if axis == 0:
            return False
        for item in found:
            node.attribute.remove(item)
        node.attribute.append(onnx.helper.make_attribute(name, axis - rank))
        return True

    @staticmethod
    def _without_first(node: onnx.NodeProto) -> bool:
        (order,) = (item for item in node.attribute if item.name == "perm")
        if order.ints[0] != 0:
            return False
        order.ints[:] = [axis - 1 for axis in order.ints[1:]]
        return True


def without_detours(
    nodes: Iterable[onnx.NodeProto], shapes: dict[str, Shape], outputs: set[str]
) -> list[onnx.NodeProto]:
    """The nodes without reshapes of reshapes, without those that change nothing, and without what nothing reads."""
    made: dict[str, onnx.NodeProto] = {}
    same: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Reshape":
            given, (result,) = node.input[0], node.output
            while given in made and made[given].op_type == "Reshape":
                given = made[given].input[0]
            node.input[0] = given
            if shapes.get(given) == shapes.get(result) and result not in outputs:
                same[result] = given
                continue
        made.update((name, node) for name in node.output)
        kept.append(node)
    while True:
        read = Counter(name for node in kept for name in node.input)
        left = [node for node in kept if any(read[name] or name in outputs for name in node.output)]
        if len(left) == len(kept):
            return left
        kept = left
