"""An ONNX graph that keeps its float16: nothing that runs it can drop the rounding between two operators.

ONNX Runtime 1.32 has no float16 kernels on x86. It computes an operator in float32, and where the next one does so too
it drops the two casts between them, whatever the optimisation level: a value of 120000 passes there, and is infinite on
a GPU and on Arm. Behind two Identities, which exist in float16, the casts stay (one between two operators in float32 is
computed in float32 with them).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.errors import ExportError
from castling_deploy.export.onnx_graphs import every_graph
from castling_deploy.export.onnx_types import inferred
from castling_deploy.target import Witness, WitnessKind

if TYPE_CHECKING:
    import onnx

    from castling_deploy.target import Arrays


def stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with two Identities behind every float16 value that an operator makes, in place."""
    import onnx

    halves = {
        value.name
        for graph in every_graph(inferred(model).graph)
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }
    for graph in reversed(list(every_graph(model.graph))):  # bodies first: nodes are copied into the graph around
        nodes = []
        for node in graph.node:
            kept = [(index, name) for index, name in enumerate(node.output) if name in halves]
            nodes.append(node)
            for index, name in kept:
                node.output[index] = f"{name}/computed"
                nodes.append(onnx.helper.make_node("Identity", [f"{name}/computed"], [f"{name}/stored"]))
                nodes.append(onnx.helper.make_node("Identity", [f"{name}/stored"], [name]))
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
    return model


class StoredSession:
    """`path`, ready to run. Raises ExportError when it is no ONNX model that ONNX Runtime takes."""

    def __init__(self, path: Path, witness: Witness) -> None:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # which keeps Identities
        try:
            model = stored(onnx.load(path)).SerializeToString()
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # FileNotFoundError, protobuf's, and ONNX Runtime's, which have no public base
            raise ExportError(
                f"ONNX Runtime does not load {path.name}: {error}", hint="export the network again"
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.witness = witness

    def __call__(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs))))


def witness() -> Witness:
    """ONNX Runtime, but not as users run it."""
    from importlib.metadata import version

    return Witness(f"onnxruntime {version('onnxruntime')}, float16 kept between operators", WitnessKind.REFERENCE)
