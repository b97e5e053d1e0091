"""float16 by explicit Cast nodes: an ONNX graph whose every type is written down, as strongly typed runtimes need it.

Arithmetic and weights are float16. What float16 cannot hold stays float32, between casts: reductions (a sum of squares
passes 65504 long before its terms do), the division that closes a norm, nodes with a constant that float16 would turn
into something else, and the modules that the network's own values leave float16 in. The interface stays float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from castling_deploy.export.binary16 import fits
from castling_deploy.export.onnx_types import inferred
from castling_deploy.export.scopes import inside, module_of

if TYPE_CHECKING:
    import onnx

# Operators with a sum over an axis in them.
REDUCTIONS = frozenset({"LayerNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "Softmax"})
# x / max(||x||, floor): float32 as long as the norm is, so that a norm is not rounded before it divides.
CLOSES_A_NORM = frozenset({"Clip", "Div", "Max"})


def half(model: onnx.ModelProto, islands: Sequence[str] = ()) -> onnx.ModelProto:
    """A new model that computes the float32 `model` in float16, its reductions and the modules `islands` in float32.

    A float32 tensor keeps its name and its float16 rounding is called `<name>_fp16`. Either is made at most once, where
    it is first needed, so that no two casts cancel. Raises ExportError when the result would not be well typed.
    """
    import onnx

    rewriting = _Rewriting(model, islands)
    for node in model.graph.node:
        rewriting.append(node)
    for output in model.graph.output:
        rewriting.version(output.name, onnx.TensorProto.FLOAT)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(
        onnx.helper.make_graph(
            rewriting.nodes, model.graph.name, model.graph.input, model.graph.output, rewriting.constants_used
        )
    )
    return inferred(result)


class _Rewriting:
    """The typed graph under construction: `nodes` in topological order, and the constants that they use."""

    def __init__(self, model: onnx.ModelProto, islands: Sequence[str]) -> None:
        import onnx

        self.islands = islands
        self.float, self.half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
        graph = inferred(model).graph
        self.opset = model.opset_import[0].version
        self.constants = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in graph.initializer
            if tensor.data_type == self.float
        }
        self.floats = {
            value.name
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.elem_type == self.float
        } | self.constants.keys()
        self.born_wide = {value.name for value in graph.input}
        self.made = set(self.born_wide)
        self.nodes: list[onnx.NodeProto] = []
        self.constants_used = [tensor for tensor in graph.initializer if tensor.name not in self.constants]

    def version(self, name: str, dtype: int) -> str:
        """The name of the tensor `name` in `dtype`; the first to need it appends its cast."""
        import numpy as np
        import onnx

        narrow = f"{name}_fp16"
        wanted, other = (name, narrow) if dtype == self.float else (narrow, name)
        if wanted not in self.made:
            self.made.add(wanted)
            if name in self.constants:
                array = self.constants[name].astype(np.float32 if dtype == self.float else np.float16)
                self.constants_used.append(onnx.numpy_helper.from_array(array, wanted))
            else:
                self.nodes.append(onnx.helper.make_node("Cast", [other], [wanted], name=f"{wanted}/Cast", to=dtype))
        return wanted

    def append(self, node: onnx.NodeProto) -> None:
        """The node with its inputs and outputs in the type that it computes in."""
        import onnx

        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        wide = self.stays_wide(node)
        typed = onnx.NodeProto()
        typed.CopyFrom(node)
        narrowed: set[str] = set()  # type variables of the schema, "T"
        for index, name in enumerate(node.input):
            if name in self.floats:
                formal = schema.inputs[min(index, len(schema.inputs) - 1)]
                narrow = not wide and "tensor(float16)" in formal.types
                typed.input[index] = self.version(name, self.half if narrow else self.float)
                narrowed |= {formal.type_str} if narrow else set()
        for index, name in enumerate(node.output):
            if name in self.floats:
                if schema.outputs[min(index, len(schema.outputs) - 1)].type_str in narrowed:
                    typed.output[index] = f"{name}_fp16"
                else:
                    self.born_wide.add(name)
                self.made.add(typed.output[index])
        self.nodes.append(typed)

    def stays_wide(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes in float32."""
        return (
            node.op_type in REDUCTIONS
            or inside(module_of(node.name), self.islands)
            or (node.op_type in CLOSES_A_NORM and not self.born_wide.isdisjoint(node.input))
            or not all(fits(self.constants[name]) for name in node.input if name in self.constants)
        )
