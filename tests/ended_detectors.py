"""A small detector's ONNX graph that ends in boxes, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime
from detectors import SEED, SMALL_DETECTOR, detector_network

from castling_deploy.export.onnx_half import half
from castling_deploy.export.onnx_nms import with_boxes
from castling_deploy.export.onnx_types import inferred
from castling_deploy.export.to_onnx import onnx_model
from castling_deploy.target import Network, Precision

Outputs = dict[str, npt.NDArray[Any]]
ADDED = ("boxes", "scores", "labels")
SIZE = SMALL_DETECTOR.image_size


@cache
def plain(shift: float, batch: int, seed: int = SEED) -> tuple[Network, onnx.ModelProto]:
    """A detector and its float32 graph, which takes torch some seconds."""
    network = detector_network(shift, batch, seed)
    return network, onnx_model(network, Precision.FP32, 20)


def ended(shift: float, batch: int, seed: int = SEED, precision: Precision = Precision.FP32) -> onnx.ModelProto:
    """What onnx_model makes with `nms`."""
    network, model = plain(shift, batch, seed)
    return inferred(with_boxes(half(model) if precision is Precision.FP16 else model, network))


def session(model: onnx.ModelProto) -> Callable[[Mapping[str, npt.NDArray[Any]]], Outputs]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in runtime.get_outputs()]
    return lambda inputs: dict(zip(names, runtime.run(names, dict(inputs)), strict=True))
