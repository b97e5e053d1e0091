"""Linears and convolutions in 8 bits, as quantise-dequantise pairs around them (QDQ).

Four flavours (seen with ONNX Runtime 1.32, TensorRT-RTX 1.7.1 and onnxruntime-qnn 2.7.0). uint8 activations, and Gemm
with an int32 bias: ONNX Runtime makes one QGemm of it, 2.1 times as fast as float32 with VNNI, where MatMul and Add
stay two float operators and int8 activations take 2.5 times as long; of a convolution between two pairs it makes one
QLinearConv. int8 activations around zero, and a float bias: the only one TensorRT parses. uint16 activations, and a
pair behind every product too: Qualcomm's HTP takes no product of levels that returns floats, and none of uint8 that
returns uint16. Or weights alone, in 8 bits or in groups of 4: ONNX Runtime multiplies by them as they are stored, and
rounds every 32 activations to 8 bits for it (MatMulNBits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import GROUP, Activations, Quantisation
from castling_deploy.errors import ExportError
from castling_deploy.export.onnx_graphs import without_unread
from castling_deploy.palette import packed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx


def in_8_bits(model: onnx.ModelProto, quantisation: Quantisation) -> onnx.ModelProto:
    """`model` (float32, static shapes, Linears on rows), the modules of `quantisation` in 8 bits. In place.

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
    without_unread(model.graph)
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
        self.products: set[str] = set()  # what a Gemm in 8 bits returns in float
        self.quantised: dict[tuple[str, float, int], str] = {}
        self.made: set[str] = set()  # names of dequantised constants

    def take(self, node: onnx.NodeProto) -> None:
        path = node.name.partition("/")[0]
        if any(node is other for other in self.gone):
            return
        by_weight = path in self.quantisation.ranges and node.input[1:2] and node.input[1] in self.constants
        if by_weight and node.op_type in ("MatMul", "Gemm") and self.quantisation.activations.as_they_are:
            self._weight_alone(node, path)
            return
        if by_weight and node.op_type == "MatMul":
            self._linear(node, path)
        elif by_weight and node.op_type == "Conv":
            self._convolution(node, path)
        else:
            self.nodes.append(node)

    def _weight_alone(self, node: onnx.NodeProto, path: str) -> None:
        weight = node.input[1]
        inputs = int(any(item.name == "transB" and item.i for item in node.attribute))  # the axis of C_in
        node.input[1], _ = self._weight(weight, 1 - inputs, None, None)
        self.nodes.append(node)
        self.done.add(path)

    def _linear(self, node: onnx.NodeProto, path: str) -> None:
        import numpy as np
        import onnx

        scale, zero, _, _ = self.quantisation.scale(path)
        given, weight = node.input
        rows = self._activation(given, scale, zero)
        bias = self._bias(node)
        levels, scales = self._weight(weight, 1, bias[1] if bias else None, scale)
        self.done.add(path)
        if bias is None or self.quantisation.activations is Activations.INT8:
            product = onnx.helper.make_node("MatMul", [rows, levels], node.output, node.name)
        else:
            added, name = bias
            shift = self._shift(name, scales * np.float32(scale))
            self.gone.append(added)
            product = onnx.helper.make_node("Gemm", [rows, levels, shift], added.output, node.name)
            if path not in self.quantisation.results:
                self.products.update(added.output)
        self.nodes.append(product)
        if path in self.quantisation.results:
            self._returned(product, path)

    def _convolution(self, node: onnx.NodeProto, path: str) -> None:
        import numpy as np

        scale, zero, _, _ = self.quantisation.scale(path)
        given, weight, *bias = node.input
        levels, scales = self._weight(weight, 0, bias[0] if bias else None, scale)
        shift = [self._shift(name, scales * np.float32(scale)) for name in bias]
        node.input[:] = [self._activation(given, scale, zero), levels, *shift]
        self.nodes.append(node)
        self._returned(node, path)
        self.done.add(path)

    def _returned(self, product: onnx.NodeProto, path: str) -> None:
        """What the module `path` returns, in levels: behind its product, which is the last node so far."""
        (result,) = product.output
        product.output[0] = f"{result}/sums"
        scale, zero, _, _ = self.quantisation.result_scale(path)
        self._pair(product.output[0], result, f"{result}/levels", scale, zero)

    def _bias(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, str] | None:
        """The addition behind a product and its constant, where nothing else reads the product."""
        readers = self.readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None
        names = [name for name in readers[0].input if name in self.constants and self.constants[name].ndim == 1]
        return (readers[0], names[0]) if names else None

    def _activation(self, name: str, scale: float, zero: int) -> str:
        """The name of `name` after 8 bits; the Linears that share a range share it."""
        import onnx

        key = (name, float(scale), zero)
        if key not in self.quantised:
            made = (
                f"{name}/8bit"
                if not any(known[0] == name for known in self.quantised)
                else f"{name}/8bit_{len(self.quantised)}"
            )
            source = name
            if name in self.products and len(self.readers[name]) > 1:
                # ONNX Runtime 1.32 takes no Gemm whose result is quantised and read in float too (22 % of the time of
                # Castling-LeViT-128S in int8, for two of its Linears): something has to stand between, and a
                # concatenation of one is nothing that it removes
                source = f"{made}/copy"
                self.nodes.append(onnx.helper.make_node("Concat", [name], [source], f"{made}/Concat", axis=-1))
            self._pair(source, made, made, scale, zero)
            self.quantised[key] = made
        return self.quantised[key]

    def _pair(self, source: str, result: str, name: str, scale: float, zero: int) -> None:
        """`source` to levels and back, as `result`."""
        import numpy as np
        import onnx

        dtype = np.dtype(self.quantisation.activations.value)
        constants = [
            self._constant(f"{name}/scale", np.asarray(scale, np.float32)),
            self._constant(f"{name}/zero", np.asarray(zero, dtype)),
        ]
        self.nodes += [
            onnx.helper.make_node("QuantizeLinear", [source, *constants], [f"{name}/levels"], f"{name}/Quantize"),
            onnx.helper.make_node("DequantizeLinear", [f"{name}/levels", *constants], [result], f"{name}/Dequantize"),
        ]

    def _weight(
        self, name: str, axis: int, bias: str | None, given_scale: float | None
    ) -> tuple[str, npt.NDArray[np.float32]]:
        """A weight in levels, its output channels on `axis`: the name of what stands for it, and the scales."""
        import numpy as np

        rows = np.moveaxis(self.constants[name], axis, 0)
        shift = self.constants[bias] if bias else None
        levels, scales = self.quantisation.levels_of(rows.reshape(len(rows), -1), shift, given_scale)
        stored = np.moveaxis(levels.reshape(rows.shape), 0, axis)
        if scales.ndim == 2:
            return self._groups(name, stored, np.moveaxis(scales, 0, axis), 1 - axis), scales
        return self._dequantised(name, stored, scales, axis), scales

    def _groups(self, name: str, levels: npt.NDArray[Any], scales: npt.NDArray[Any], axis: int) -> str:
        """A weight in int4, its inputs on `axis`: the name of what stands for it."""
        import numpy as np
        import onnx

        made = f"{name}/float"
        if made in self.made:
            return made
        self.made.add(made)
        data = packed(levels, 4).tobytes()
        stored = onnx.helper.make_tensor(f"{name}/levels", onnx.TensorProto.INT4, levels.shape, data, raw=True)
        self.model.graph.initializer.append(stored)
        names = [stored.name, self._constant(f"{name}/scales", np.ascontiguousarray(scales))]
        self.nodes.append(
            onnx.helper.make_node("DequantizeLinear", names, [made], f"{made}/Dequantize", axis=axis, block_size=GROUP)
        )
        return made

    def _shift(self, name: str, steps: npt.NDArray[np.float32]) -> str:
        """A bias (C_out,) in int32."""
        import numpy as np

        return self._dequantised(name, np.round(self.constants[name] / steps).astype(np.int32), steps, 0)

    def _dequantised(self, name: str, levels: npt.NDArray[Any], scales: npt.NDArray[Any], axis: int) -> str:
        import numpy as np
        import onnx

        made = f"{name}/float"
        if made in self.made:  # of a module that is called twice
            return made
        self.made.add(made)
        names = [
            self._constant(f"{name}/levels", levels),
            self._constant(f"{name}/scales", scales),
            self._constant(f"{name}/zeros", np.zeros(len(scales), levels.dtype)),
        ]
        self.nodes.append(onnx.helper.make_node("DequantizeLinear", names, [made], f"{made}/Dequantize", axis=axis))
        return made

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        import numpy as np
        import onnx

        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name
