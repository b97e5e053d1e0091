"""Boxes inside the ONNX graph are those of castling_deploy.detection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from detectors import FEW, MANY, SEED, SMALL_DETECTOR, detector_network, images, network_around, of_size, raw_specs
from ended_detectors import ADDED, SIZE, Outputs, ended, plain, session
from folded_networks import folded_network
from onnx import TensorProto, helper
from torch import nn

from castling_deploy.detection import detections
from castling_deploy.errors import UsageError
from castling_deploy.export import onnx_nms
from castling_deploy.export.onnx_half import half
from castling_deploy.export.onnx_nms import with_boxes
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.onnx_types import inferred
from castling_deploy.export.to_onnx import OnnxTarget, onnx_model
from castling_deploy.models.dense import DenseConfig
from castling_deploy.models.pico_head import output_names
from castling_deploy.target import Precision


def ending_of(config: DenseConfig, batch: int) -> Callable[[Outputs], Outputs]:
    """The ending alone, fed with raw outputs."""
    specs = raw_specs(batch, config)
    values = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in specs]
    fed = [helper.make_tensor_value_info(f"fed_{spec.name}", TensorProto.FLOAT, spec.shape) for spec in specs]
    copies = [helper.make_node("Identity", [given.name], [value.name]) for given, value in zip(fed, values)]
    graph = helper.make_graph(copies, "ending", fed, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    call = session(inferred(with_boxes(model, network_around(nn.Identity(), batch, config))))
    return lambda outputs: call({f"fed_{name}": values for name, values in outputs.items()})


def raw(config: DenseConfig, batch: int, seed: int, *, density: float = 0.2, steps: int = 0) -> Outputs:
    """Random raw outputs: `density` of the scores over the threshold; with `steps`, so few values that many are equal,
    and boxes on a grid of half strides."""
    rng = np.random.default_rng(seed)
    outputs = {}
    for spec in raw_specs(batch, config):
        if spec.name.startswith("cls"):
            values = rng.uniform(0.026, 1, spec.shape) * (rng.uniform(size=spec.shape) < density)
            outputs[spec.name] = np.round(values * steps) / steps if steps else values
        else:
            values = rng.normal(scale=3, size=spec.shape)
            if steps:  # each side 0, 0.5, 1 ... strides: half of its weight on each of two bins
                sides = rng.integers(0, 2 * config.head.reg_max, (*spec.shape[:2], 4, 1))
                bins = np.arange(config.head.reg_max + 1)
                values = np.where((bins == sides // 2) | (bins == (sides + 1) // 2), 0.0, -1e4).reshape(spec.shape)
            outputs[spec.name] = values
    return {name: values.astype(np.float32) for name, values in outputs.items()}


def assert_same_detections(outputs: Outputs, size: tuple[int, int]) -> None:
    for image in range(len(outputs["scores"])):
        found = detections(outputs, size, image=image)
        count = len(found)
        np.testing.assert_array_equal(outputs["scores"][image, :count], found.scores)
        np.testing.assert_array_equal(outputs["labels"][image, :count], found.labels)
        np.testing.assert_allclose(outputs["boxes"][image, :count], found.boxes, atol=2e-4)
        assert not outputs["scores"][image, count:].any() and not outputs["boxes"][image, count:].any()
        assert (outputs["labels"][image, count:] == -1).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.05, 0.9])
def test_the_ending_finds_what_numpy_finds(density: float, batch: int) -> None:
    call = ending_of(SMALL_DETECTOR, batch)
    for seed in range(10):
        outputs = raw(SMALL_DETECTOR, batch, seed, density=density)
        assert_same_detections({**outputs, **call(outputs)}, SIZE)


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_ties_and_overlaps_on_the_edge_are_decided_alike(steps: int) -> None:
    """Of equal scores the finer level, the earlier cell, the lower class; an overlap of exactly 0.6 is allowed."""
    call = ending_of(SMALL_DETECTOR, 2)
    for seed in range(10):
        outputs = raw(SMALL_DETECTOR, 2, seed, density=0.02 * seed, steps=steps)
        assert_same_detections({**outputs, **call(outputs)}, SIZE)


def test_a_score_of_exactly_the_threshold_is_not_above_it() -> None:
    outputs = {name: np.zeros_like(values) for name, values in raw(SMALL_DETECTOR, 1, 0).items()}
    threshold = np.float32(0.025)
    outputs["cls_pred_stride_32"][0, 3, :3] = np.nextafter(threshold, 0), threshold, np.nextafter(threshold, 1)
    found = ending_of(SMALL_DETECTOR, 1)(outputs)
    assert found["labels"][0, :2].tolist() == [2, -1]


@pytest.mark.parametrize(("height", "width", "classes", "rows"), [(32, 32, 1, 22), (64, 32, 2, 86), (320, 416, 1, 100)])
def test_there_are_as_many_rows_as_there_can_be_detections(height: int, width: int, classes: int, rows: int) -> None:
    config = of_size(height, width, classes)
    call = ending_of(config, 1)
    for density in (0.0, 0.5, 1.0):
        outputs = raw(config, 1, 0, density=density)
        found = call(outputs)
        assert found["boxes"].shape == (1, rows, 4) and found["scores"].shape == found["labels"].shape == (1, rows)
        assert_same_detections({**outputs, **found}, config.image_size)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize(("batch", "shift", "seed"), [(1, MANY, 1), (2, MANY, SEED), (2, FEW, SEED)])
def test_the_graph_finds_what_numpy_makes_of_its_raw_outputs(
    batch: int, shift: float, seed: int, precision: Precision
) -> None:
    outputs = session(ended(shift, batch, seed, precision))({"image": images(batch).numpy()})
    assert_same_detections(outputs, SIZE)
    assert outputs["scores"].any()
    assert outputs["boxes"].dtype == outputs["scores"].dtype == np.float32 and outputs["labels"].dtype == np.int64


@pytest.mark.parametrize("opset", [20, 25])
def test_a_dynamic_batch_ends_in_boxes_too(opset: int) -> None:
    call = session(onnx_model(detector_network(), Precision.FP32, opset, dynamic=True, nms=True))
    for batch in (1, 2, 5):
        assert_same_detections(call({"image": images(batch).numpy()}), SIZE)


def test_raw_outputs_are_untouched_and_the_interface_is_the_promised_one(tmp_path: Path) -> None:
    network, model = plain(MANY, batch=2)
    target = OnnxTarget()
    artifact = target.export(network, Precision.FP16, OnnxOptions(nms=True), tmp_path)
    alone = session(half(model))({"image": images(2).numpy()})
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [spec.name for spec in artifact.outputs] == [*output_names(), *ADDED]
    types = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}
    for spec, value in zip(artifact.outputs, model.graph.output, strict=True):
        tensor = value.type.tensor_type
        assert (spec.name, spec.shape) == (value.name, tuple(axis.dim_value for axis in tensor.shape.dim))
        assert spec.dtype == types[tensor.elem_type]
    with target.load(tmp_path) as call:
        outputs = call({"image": images(2).numpy()})
    for name, values in alone.items():
        np.testing.assert_array_equal(outputs[name], values)
    assert model.graph == ended(MANY, 2, precision=Precision.FP16).graph  # the facts beside it are the exporter's
    assert artifact.details["products"].keys() == {"fp16"}
    for words in ("`boxes` (B, K, 4)", "x1 y1 x2 y2", "K = 100", "96 x 128", "labels of -1", "0.025", "0.6"):
        assert words in artifact.usage


def test_nothing_of_the_ending_is_float16() -> None:
    model = ended(MANY, 2, precision=Precision.FP16)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    ours = {name: dtype for name, dtype in types.items() if name.startswith("nms/")}
    assert len(ours) > 30 and TensorProto.FLOAT16 not in ours.values()


def test_a_network_that_is_no_detector_is_refused() -> None:
    with pytest.raises(UsageError, match="no detector") as caught:
        onnx_model(folded_network("deit"), Precision.FP32, 20, nms=True)
    assert "--nms" in (caught.value.hint or "")


def test_every_added_output_has_its_spec() -> None:
    specs = onnx_nms.outputs(network_around(nn.Identity(), batch=3))
    assert [(spec.name, spec.shape) for spec in specs] == [
        ("boxes", (3, 100, 4)),
        ("scores", (3, 100)),
        ("labels", (3, 100)),
    ]
