"""Boxes inside the ONNX graph: a wrong graph is told from a right one, by defects planted one at a time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from detectors import FEW, MANY, images
from ended_detectors import ADDED, SIZE, ended, plain, session
from onnx import TensorProto, helper, numpy_helper

from castling_deploy.ladder import run
from castling_deploy.models.pico_head import output_names
from castling_deploy.parity import TOLERANCES, Reference, Verdict
from castling_deploy.target import Precision
from castling_deploy.task import Detection
from castling_deploy.verification import compared


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
