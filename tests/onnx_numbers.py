"""What an ONNX model computes, whatever a runtime would make of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from folded_networks import images_for
from onnx.reference import ReferenceEvaluator

from castling_deploy.export.onnx_graphs import every_graph
from castling_deploy.target import Network


def unoptimised(model: onnx.ModelProto, network: Network) -> np.ndarray:
    """The first output on two images, computed node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = network.inputs[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in images_for(network, 2)])


def exactly(model: onnx.ModelProto, network: Network) -> np.ndarray:
    """The first output on one batch, in float64, operator by operator as ONNX defines them."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for graph in every_graph(twin.graph):
        del graph.value_info[:]
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float64)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for value in (*graph.input, *graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    image = images_for(network, network.inputs[0].shape[0]).astype(np.float64)
    output: np.ndarray = ReferenceEvaluator(twin).run(None, {network.inputs[0].name: image})[0]
    return output
