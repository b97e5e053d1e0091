"""Boxes inside the ONNX graph are those of castling_deploy.detection, and a wrong graph is told from a right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from detectors import FEW, MANY, SEED, SMALL_DETECTOR, detector_network, images, network_around, of_size, raw_specs
from folded_networks import folded_network
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from castling_deploy.detection import detections
from castling_deploy.errors import UsageError
from castling_deploy.export import onnx_nms
from castling_deploy.export.onnx_half import half
from castling_deploy.export.onnx_nms import with_boxes
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.onnx_types import inferred
from castling_deploy.export.to_onnx import OnnxTarget, onnx_model
from castling_deploy.ladder import run
from castling_deploy.models.dense import DenseConfig
from castling_deploy.models.pico_head import output_names
from castling_deploy.parity import TOLERANCES, Reference, Verdict
from castling_deploy.target import Network, Precision
from castling_deploy.task import Detection
from castling_deploy.verification import compared

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


# Defects that such an ending can have, planted one at a time.


def constant(model: onnx.ModelProto, name: str, change: Callable[[npt.NDArray[Any]], npt.ArrayLike]) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == f"nms/{name}")
    before = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(before), before.dtype), tensor.name))


def node(model: onnx.ModelProto, operator: str, which: int = 0) -> onnx.NodeProto:
    return [each for each in model.graph.node if each.op_type == operator and each.name.startswith("nms/")][which]


def after(model: onnx.ModelProto, output: str, operator: str, *inputs: str, **attributes: object) -> None:
    """Put a node after the tensor `output`, which keeps its name for its readers."""
    maker = next(each for each in model.graph.node if output in each.output)
    before = f"{output}_before" if not output.endswith("_before") else output
    while any(before in each.output for each in model.graph.node):
        before += "_before"
    maker.output[list(maker.output).index(output)] = before
    position = list(model.graph.node).index(maker) + 1
    given = [before if name == "_" else name for name in inputs]
    model.graph.node.insert(position, helper.make_node(operator, given, [output], **attributes))


def extra(model: onnx.ModelProto, name: str, value: npt.ArrayLike, dtype: Any = np.float32) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))


def boxes_before_suppression(model: onnx.ModelProto) -> str:
    return node(model, "NonMaxSuppression").input[0]


def labels_one_too_high(model: onnx.ModelProto) -> None:
    extra(model, "one", 1, np.int64)
    after(model, "labels", "Add", "_", "one")


def labels_of_cells(model: onnx.ModelProto) -> None:
    node(model, "Mod").op_type = "Div"


def boxes_of_the_wrong_cells(model: onnx.ModelProto) -> None:
    node(model, "Div").op_type = "Mod"


def y_before_x(model: onnx.ModelProto) -> None:
    extra(model, "yxyx", [1, 0, 3, 2], np.int64)
    after(model, "boxes", "Gather", "_", "yxyx", axis=2)


def corner_and_size(model: onnx.ModelProto) -> None:
    extra(model, "first", np.array([[1, 0, -1, 0], [0, 1, 0, -1], [0, 0, 1, 0], [0, 0, 0, 1]]))
    after(model, "boxes", "MatMul", "_", "first")


def sides_in_another_order(model: onnx.ModelProto) -> None:
    """Left, right, top, bottom, where the head has left, top, right, bottom."""
    extra(model, "ltrb", [0, 2, 1, 3], np.int64)
    after(model, node(model, "ReduceSum").output[0], "Gather", "_", "ltrb", axis=2)


def cells_column_by_column(model: onnx.ModelProto) -> None:
    def transposed(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
        cells = points[: 12 * 16].reshape(12, 16, 4).transpose(1, 0, 2).reshape(-1, 4)
        return np.concatenate([cells, points[12 * 16 :]])

    constant(model, "centres", transposed)


def no_clip(model: onnx.ModelProto) -> None:
    constant(model, "least", lambda value: -1e4)
    constant(model, "most", lambda value: value + 1e4)


def clipped_to_the_image_on_its_side(model: onnx.ModelProto) -> None:
    constant(model, "most", lambda value: value[[1, 0, 1, 0]])


def one_pixel_less(model: onnx.ModelProto) -> None:
    constant(model, "most", lambda value: value - 1)


def corners_for_centres(model: onnx.ModelProto) -> None:
    constant(model, "centres", lambda points: points - points[0])


def bins_counted_from_one(model: onnx.ModelProto) -> None:
    constant(model, "steps", lambda steps: steps + 1)


def stride_forgotten(model: onnx.ModelProto) -> None:
    constant(model, "reach", np.sign)


def softmax_over_the_sides(model: onnx.ModelProto) -> None:
    node(model, "Softmax").attribute[0].i = -2


def boxes_through_float16(model: onnx.ModelProto) -> None:
    boxes = boxes_before_suppression(model)
    after(model, boxes, "Cast", "_", to=TensorProto.FLOAT16)
    after(model, boxes, "Cast", "_", to=TensorProto.FLOAT)


def looser_overlap(model: onnx.ModelProto) -> None:
    constant(model, "iou", lambda value: 0.65)


def stricter_overlap(model: onnx.ModelProto) -> None:
    constant(model, "iou", lambda value: 0.55)


def no_suppression(model: onnx.ModelProto) -> None:
    constant(model, "iou", lambda value: 1.0)


def the_best_class_of_a_cell_alone(model: onnx.ModelProto) -> None:
    """As detectors with one softmax over the classes have it."""
    scores = node(model, "NonMaxSuppression").input[1]
    extra(model, "class_axis", [1], np.int64)
    after(model, scores, "Mul", "_", "is_best")
    position = next(i for i, each in enumerate(model.graph.node) if scores in each.output)
    before = f"{scores}_before"
    model.graph.node.insert(position, helper.make_node("Cast", ["is_best_bool"], ["is_best"], to=TensorProto.FLOAT))
    model.graph.node.insert(position, helper.make_node("Equal", [before, "best_class"], ["is_best_bool"]))
    model.graph.node.insert(position, helper.make_node("ReduceMax", [before, "class_axis"], ["best_class"]))


def center_and_size_suppressed(model: onnx.ModelProto) -> None:
    node(model, "NonMaxSuppression").attribute.append(helper.make_attribute("center_point_box", 1))


def higher_threshold(model: onnx.ModelProto) -> None:
    node(model, "ThresholdedRelu").attribute[0].f = 0.05


def lower_threshold(model: onnx.ModelProto) -> None:
    node(model, "ThresholdedRelu").attribute[0].f = 0.01


def fewer_of_a_level(model: onnx.ModelProto) -> None:
    constant(model, "per_level", lambda value: [100])


def fewer_of_a_class(model: onnx.ModelProto) -> None:
    constant(model, "keep_of_class", lambda value: 5)


def scores_of_another_order(model: onnx.ModelProto) -> None:
    """Cells and classes taken for classes and cells."""
    constant(model, "pairs", lambda shape: shape[[0, 2, 1]])
    node(model, "Transpose").attribute[0].ints[:] = [0, 1, 2]
    constant(model, "image_cell_class", lambda value: [0, 1, 2])


def worst_first(model: onnx.ModelProto) -> None:
    for name, axis in (("scores", 1), ("labels", 1), ("boxes", 1)):
        for index, value in (("starts", -1), ("ends", -1000), ("axes", axis), ("steps", -1)):
            extra(model, f"{name}_{index}", [value], np.int64)
        after(model, name, "Slice", "_", *(f"{name}_{index}" for index in ("starts", "ends", "axes", "steps")))


def images_exchanged(model: onnx.ModelProto) -> None:
    extra(model, "other", [1, 0], np.int64)
    after(model, "boxes", "Gather", "_", "other", axis=0)


def empty_rows_of_class_zero(model: onnx.ModelProto) -> None:
    constant(model, "no_label", lambda value: 0)


def empty_rows_with_boxes(model: onnx.ModelProto) -> None:
    constant(model, "no_box", lambda value: 7)


def scores_of_the_square(model: onnx.ModelProto) -> None:
    after(model, "scores", "Sqrt", "_")


DEFECTS = (
    labels_one_too_high,
    labels_of_cells,
    boxes_of_the_wrong_cells,
    y_before_x,
    corner_and_size,
    sides_in_another_order,
    cells_column_by_column,
    no_clip,
    clipped_to_the_image_on_its_side,
    one_pixel_less,
    corners_for_centres,
    bins_counted_from_one,
    stride_forgotten,
    softmax_over_the_sides,
    boxes_through_float16,
    looser_overlap,
    stricter_overlap,
    no_suppression,
    the_best_class_of_a_cell_alone,
    center_and_size_suppressed,
    fewer_of_a_level,
    fewer_of_a_class,
    scores_of_another_order,
    worst_first,
    images_exchanged,
    scores_of_the_square,
)
# What only images with less than 100 detections show.
DEFECTS_OF_FEW = (
    higher_threshold,
    lower_threshold,
    empty_rows_of_class_zero,
    empty_rows_with_boxes,
    labels_one_too_high,
)

IMAGES = images(12)


@cache
def references(shift: float) -> dict[str, Reference]:
    """What PyTorch says of the images."""
    network, _ = plain(shift, batch=2)
    expected = run(network.module, output_names(), IMAGES.numpy())
    exact = run(deepcopy(network.module).double(), output_names(), IMAGES.double().numpy())
    noise = {name: Reference(expected[name], len(IMAGES), noise=0.0).rel(expected[name], exact[name]) for name in exact}
    return {name: Reference(values, len(IMAGES), noise[name] or 0.0) for name, values in expected.items()}


class Case:
    """A detector, what the reference says of it, and its graph in a precision."""

    def __init__(self, shift: float, precision: Precision) -> None:
        self.tolerance, self.references = TOLERANCES[precision], references(shift)
        self.model = ended(shift, 2, precision=precision)

    def verdicts(self, model: onnx.ModelProto) -> dict[str, Verdict]:
        call = session(model)
        parts = [call({"image": pair.numpy()}) for pair in IMAGES.split(2)]
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        seen = compared(Detection(), outputs, self.references, self.tolerance, SIZE)
        return {parity.name: parity.verdict for parity in seen}

    def with_defect(self, defect: Callable[[onnx.ModelProto], None]) -> dict[str, Verdict]:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.ClearField("value_info")
        defect(model)
        return self.verdicts(model)


@pytest.fixture(scope="module")
def many() -> Case:
    """In float16, whose limits are the looser ones."""
    return Case(MANY, Precision.FP16)


@pytest.fixture(scope="module")
def few() -> Case:
    return Case(FEW, Precision.FP16)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("shift", [MANY, FEW])
def test_a_sound_graph_passes(shift: float, precision: Precision) -> None:
    case = Case(shift, precision)
    verdicts = case.verdicts(case.model)
    assert verdicts.keys() == {*output_names(), *ADDED}
    assert {verdicts[name] for name in ADDED} == {Verdict.PASS}
    assert Verdict.FAIL not in verdicts.values()


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_every_planted_defect_fails(defect: Callable[[onnx.ModelProto], None], many: Case) -> None:
    verdicts = many.with_defect(defect)
    assert Verdict.FAIL in {verdicts[name] for name in ADDED}
    assert Verdict.FAIL not in {verdicts[name] for name in output_names()}, "the raw outputs are those of before"


@pytest.mark.parametrize("defect", DEFECTS_OF_FEW, ids=lambda defect: defect.__name__)
def test_every_planted_defect_of_few_detections_fails(defect: Callable[[onnx.ModelProto], None], few: Case) -> None:
    verdicts = few.with_defect(defect)
    assert Verdict.FAIL in {verdicts[name] for name in ADDED}


def test_a_graph_that_never_saw_a_detection_is_inconclusive() -> None:
    case = Case(-30, Precision.FP32)
    verdicts = case.verdicts(case.model)
    assert {verdicts[name] for name in ADDED} == {Verdict.INCONCLUSIVE}


def test_every_added_output_has_its_spec() -> None:
    specs = onnx_nms.outputs(network_around(nn.Identity(), batch=3))
    assert [(spec.name, spec.shape) for spec in specs] == [
        ("boxes", (3, 100, 4)),
        ("scores", (3, 100)),
        ("labels", (3, 100)),
    ]
