"""Linears in 8 bits, as quantise-dequantise pairs around them (QDQ).

Two flavours (seen with ONNX Runtime 1.32 and TensorRT-RTX 1.7.1). uint8 activations, and Gemm with an int32 bias: ONNX
Runtime makes one QGemm of it, 2.1 times as fast as float32 with VNNI, where MatMul and Add stay two float operators and
int8 activations take 2.5 times as long. int8 activations around zero, and a float bias: the only one TensorRT parses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import Activations, Quantisation, weight_levels
from castling_deploy.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx


def in_8_bits(model: onnx.ModelProto, quantisation: Quantisation) -> onnx.ModelProto:
    """`model` (float32, static shapes, Linears on rows), the Linears of `quantisation` in 8 bits. In place.

    Raises ExportError where one of them is not in the graph.
    """
    rewriting = _Rewriting(model, quantisation)
    for node in list(model.graph.node):
        rewriting.take(node)
    missing = quantisation.ranges.keys() - rewriting.done
    if missing:
        raise ExportError(f"the graph has no product of {min(missing)}", hint="report this network")
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(rewriting.nodes)
    used = {name for node in rewriting.nodes for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    return model


class _Rewriting:
    """The graph so far; `gone` are the additions of a bias that Gemm has taken in."""

    def __init__(self, model: onnx.ModelProto, quantisation: Quantisation) -> None:
        import onnx

        self.model, self.quantisation = model, quantisation
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes: list[onnx.NodeProto] = []
        self.gone: list[onnx.NodeProto] = []
        self.done: set[str] = set()
        self.products: set[str] = set()  # what a Gemm in 8 bits returns
        self.quantised: dict[tuple[str, float, int], str] = {}

    def take(self, node: onnx.NodeProto) -> None:
        path = node.name.partition("/")[0]
        is_linear = node.op_type == "MatMul" and path in self.quantisation.ranges and node.input[1] in self.constants
        if any(node is other for other in self.gone):
            return
        if is_linear:
            self._linear(node, path)
        else:
            self.nodes.append(node)

    def _linear(self, node: onnx.NodeProto, path: str) -> None:
        import numpy as np
        import onnx

        scale, zero, _, _ = self.quantisation.scale(path)
        given, weight = node.input
        rows = self._activation(given, scale, zero)
        levels, scales = self._weight(weight)
        self.done.add(path)
        bias = self._bias(node)
        if bias is None or self.quantisation.activations is Activations.INT8:
            self.nodes.append(onnx.helper.make_node("MatMul", [rows, levels], node.output, node.name))
            return
        added, name = bias
        steps = (scales * np.float32(scale)).astype(np.float32)
        shift = self._dequantised(
            f"{path}.bias",
            np.round(self.constants[name] / steps).astype(np.int32),
            steps,
            np.zeros_like(steps, np.int32),
            0,
        )
        self.gone.append(added)
        self.products.update(added.output)
        self.nodes.append(onnx.helper.make_node("Gemm", [rows, levels, shift], added.output, node.name))

    def _bias(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, str] | None:
        """The addition behind a product and its constant, where nothing else reads the product."""
        readers = self.readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None
        names = [name for name in readers[0].input if name in self.constants and self.constants[name].ndim == 1]
        return (readers[0], names[0]) if names else None

    def _activation(self, name: str, scale: float, zero: int) -> str:
        """The name of `name` after 8 bits; the Linears that share a range share it."""
        import numpy as np
        import onnx

        key = (name, float(scale), zero)
        if key not in self.quantised:
            made = (
                f"{name}/8bit"
                if not any(known[0] == name for known in self.quantised)
                else f"{name}/8bit_{len(self.quantised)}"
            )
            dtype = np.int8 if self.quantisation.activations is Activations.INT8 else np.uint8
            constants = [
                self._constant(f"{made}/scale", np.asarray(scale, np.float32)),
                self._constant(f"{made}/zero", np.asarray(zero, dtype)),
            ]
            source = name
            if name in self.products and len(self.readers[name]) > 1:
                # ONNX Runtime 1.32 takes no Gemm whose result is quantised and read in float too (22 % of the time of
                # Castling-LeViT-128S in int8, for two of its Linears): something has to stand between, and a
                # concatenation of one is nothing that it removes
                source = f"{made}/copy"
                self.nodes.append(onnx.helper.make_node("Concat", [name], [source], f"{made}/Concat", axis=-1))
            self.nodes += [
                onnx.helper.make_node("QuantizeLinear", [source, *constants], [f"{made}/levels"], f"{made}/Quantize"),
                onnx.helper.make_node("DequantizeLinear", [f"{made}/levels", *constants], [made], f"{made}/Dequantize"),
            ]
            self.quantised[key] = made
        return self.quantised[key]

    def _weight(self, name: str) -> tuple[str, npt.NDArray[np.float32]]:
        """A weight (C_in, C_out) in int8: the name of what stands for it, and the scales (C_out,)."""
        import numpy as np

        levels, scales = weight_levels(self.constants[name].T)
        return self._dequantised(name, levels.T, scales, np.zeros(len(scales), np.int8), 1), scales

    def _dequantised(
        self, name: str, levels: npt.NDArray[Any], scales: npt.NDArray[Any], zeros: npt.NDArray[Any], axis: int
    ) -> str:
        import onnx

        made = f"{name}/float"
        names = [
            self._constant(f"{name}/levels", levels),
            self._constant(f"{name}/scales", scales),
            self._constant(f"{name}/zeros", zeros),
        ]
        self.nodes.append(onnx.helper.make_node("DequantizeLinear", names, [made], f"{made}/Dequantize", axis=axis))
        return made

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        import numpy as np
        import onnx

        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name
