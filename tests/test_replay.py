"""A replayed suppression follows an artefact where rounding leaves a choice, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from castling_deploy.detection import IOU, KEEP, Detections, candidates, detections, overlaps, suppressed
from castling_deploy.errors import ExportError
from castling_deploy.parity import TOLERANCES, Reference, Verdict
from castling_deploy.rechecking.replay import ROUNDING, doubt
from castling_deploy.target import Precision
from castling_deploy.task import LIMITS, Detection
from castling_deploy.verification import compared

SIZE, CLASSES, BINS = (64, 96), 3, 8
CELLS = {8: 96, 16: 24, 32: 6, 64: 2}
IMAGES = 6
Outputs = dict[str, npt.NDArray[Any]]
Answer = Callable[[Detections], Detections]


def raw(seed: int, *, on_a_grid: bool) -> Outputs:
    """Random raw outputs; on a grid, many scores are equal and many overlaps exactly 0.6."""
    rng = np.random.default_rng(seed)
    outputs = {}
    for stride, cells in CELLS.items():
        shape, density = (IMAGES, cells, CLASSES), [0.5, 0.1, 0.0] if on_a_grid else [0.6] * CLASSES
        scores = rng.uniform(0.03, 1, shape) * (rng.uniform(size=shape) < density)
        logits = rng.normal(scale=3, size=(IMAGES, cells, 4 * BINS))
        if on_a_grid:
            scores = np.round(scores * 6) / 6
            sides = rng.choice([0, 2, 2, 3, 3], (IMAGES, cells, 4, 1))  # 0, 1 or 1.5 strides
            bins = np.arange(BINS)
            logits = np.where((bins == sides // 2) | (bins == (sides + 1) // 2), 0.0, -1e4).reshape(logits.shape)
        outputs[f"cls_pred_stride_{stride}"] = scores.astype(np.float32)
        outputs[f"dis_pred_stride_{stride}"] = logits.astype(np.float32)
    return outputs


def filled(answers: list[Detections], rows: int = KEEP) -> Outputs:
    """Detections as an artefact returns them."""
    boxes, scores = np.zeros((IMAGES, rows, 4), np.float32), np.zeros((IMAGES, rows), np.float32)
    labels = np.full((IMAGES, rows), -1)
    for image, found in enumerate(answers):
        count = len(found)
        boxes[image, :count], scores[image, :count], labels[image, :count] = found.boxes, found.scores, found.labels
    return {"boxes": boxes, "scores": scores, "labels": labels}


def answered(outputs: Outputs, answer: Answer) -> Outputs:
    """Raw outputs and what an artefact makes of the candidates of each image."""
    return {**outputs, **filled([answer(candidates(outputs, SIZE, image=image)) for image in range(IMAGES)])}


def rows(found: Detections, kept: npt.NDArray[np.intp]) -> Detections:
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept])


def right(found: Detections) -> Detections:
    return rows(found, suppressed(found, IOU, KEEP))


def rounded_otherwise(rng: np.random.Generator) -> Answer:
    """Another order of the equal scores, and coordinates that are some ulp away."""

    def answer(found: Detections) -> Detections:
        mixed = rows(found, rng.permutation(len(found)))
        moved = mixed.boxes + rng.uniform(-1e-4, 1e-4, mixed.boxes.shape).astype(np.float32)
        return right(Detections(moved, mixed.scores, mixed.labels))

    return answer


def verdicts(outputs: Outputs, precision: Precision = Precision.FP32) -> dict[str, Verdict]:
    """Of the added outputs; the raw ones are the reference's."""
    references = {name: Reference(values, IMAGES, 0.0) for name, values in outputs.items() if name not in LIMITS}
    seen = compared(Detection(), outputs, references, TOLERANCES[precision], SIZE)
    assert Verdict.FAIL not in {parity.verdict for parity in seen if parity.name not in LIMITS}
    assert {parity.top1_agreement for parity in seen} == {None}
    return {parity.name: parity.verdict for parity in seen if parity.name in LIMITS}


@pytest.mark.parametrize("on_a_grid", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_an_answer_that_differs_by_rounding_alone_passes(seed: int, on_a_grid: bool) -> None:
    outputs = raw(seed, on_a_grid=on_a_grid)
    for answer in (right, rounded_otherwise(np.random.default_rng(seed))):
        assert set(verdicts(answered(outputs, answer)).values()) == {Verdict.PASS}


def test_rounding_alone_does_change_answers() -> None:
    """So that the test above says something: boxes come and go, and rows are exchanged."""
    exchanged, others = 0, 0
    for seed in range(12):
        outputs = raw(seed, on_a_grid=True)
        one, two = (answered(outputs, answer) for answer in (right, rounded_otherwise(np.random.default_rng(seed))))
        for first, second in zip(one["boxes"].round(1).tolist(), two["boxes"].round(1).tolist()):
            exchanged += first != second
            others += sorted(first) != sorted(second)
    assert exchanged == 12 * IMAGES and others > IMAGES


def one_missing(found: Detections) -> Detections:
    return rows(right(found), np.delete(np.arange(len(right(found))), 3))


def one_that_falls(found: Detections) -> Detections:
    """A box that a better one of its class covers wholly, kept."""
    kept = suppressed(found, IOU, KEEP)
    for index in np.setdiff1d(np.arange(len(found)), kept):
        rivals = kept[(found.labels[kept] == found.labels[index]) & (found.scores[kept] > found.scores[index])]
        if overlaps(found.boxes[index], found.boxes[rivals]).max(initial=0) > 0.7:
            more = np.append(kept, index)
            return rows(found, more[np.argsort(-found.scores[more], kind="stable")][:KEEP])
    raise AssertionError("nothing falls")


def one_class_for_all(found: Detections) -> Detections:
    return rows(found, suppressed(Detections(found.boxes, found.scores, np.zeros_like(found.labels)), IOU, KEEP))


def another_overlap(found: Detections) -> Detections:
    return rows(found, suppressed(found, 0.65, KEEP))


def first_two_exchanged(found: Detections) -> Detections:
    return rows(right(found), np.array([1, 0, *range(2, len(right(found)))]))


def one_label_wrong(found: Detections) -> Detections:
    answer = right(found)
    return Detections(answer.boxes, answer.scores, answer.labels + (np.arange(len(answer)) == 2))


def a_hundredth_of_a_pixel(found: Detections) -> Detections:
    return Detections(right(found).boxes + np.float32(0.01), right(found).scores, right(found).labels)


def the_same_twice(found: Detections) -> Detections:
    answer = right(found)
    return rows(answer, np.array([0, *range(len(answer))])[:KEEP])


def fifty_rows_alone(found: Detections) -> Detections:
    return rows(right(found), np.arange(min(50, len(right(found)))))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize(
    "answer",
    [
        one_missing,
        one_that_falls,
        one_class_for_all,
        another_overlap,
        first_two_exchanged,
        one_label_wrong,
        a_hundredth_of_a_pixel,
        the_same_twice,
        fifty_rows_alone,
    ],
    ids=lambda answer: answer.__name__,
)
def test_a_wrong_answer_fails_whatever_the_precision(answer: Answer, precision: Precision) -> None:
    for seed in range(3):
        assert Verdict.FAIL in verdicts(answered(raw(seed, on_a_grid=False), answer), precision).values()


def test_another_number_of_rows_fails() -> None:
    outputs = answered(raw(0, on_a_grid=False), right)
    cut = {name: values[:, :50] if name in LIMITS else values for name, values in outputs.items()}
    assert set(verdicts(cut).values()) == {Verdict.FAIL}
    flat = {name: values.reshape(IMAGES, -1) if name == "boxes" else values for name, values in outputs.items()}
    assert verdicts(flat)["boxes"] is Verdict.FAIL


def test_nothing_follows_from_raw_outputs_that_cannot_be_compared() -> None:
    outputs = answered(raw(0, on_a_grid=False), right)
    references = {name: Reference(values, IMAGES, 0.0) for name, values in outputs.items() if name not in LIMITS}
    outputs["cls_pred_stride_8"] = np.full_like(outputs["cls_pred_stride_8"], np.nan)
    seen = compared(Detection(), outputs, references, TOLERANCES[Precision.FP32], SIZE)
    assert [parity.name for parity in seen] == list(references) and seen[0].verdict is Verdict.FAIL


def test_boxes_without_their_scores_and_labels_are_not_known() -> None:
    outputs = answered(raw(0, on_a_grid=False), right)
    del outputs["scores"], outputs["labels"]
    with pytest.raises(ExportError, match="nothing is known of the artefact's output 'boxes'"):
        verdicts(outputs)


@pytest.mark.parametrize("side", [0.0, 0.01, 1.0, 50.0])
def test_doubt_bounds_what_rounding_does_to_an_overlap(side: float) -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(10, 10 + side, (2000, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, side, (2000, 2))], axis=1).astype(np.float32)
    for first in boxes[:20]:
        moved, other = (
            np.sort((box + rng.uniform(-ROUNDING, ROUNDING, box.shape).astype(np.float32)).reshape(-1, 2, 2), axis=1)
            for box in (first[None], boxes)
        )
        change = overlaps(moved.reshape(4), other.reshape(-1, 4)) - overlaps(first, boxes)
        assert (np.abs(change) <= doubt(first, boxes) + 1e-6).all()


def test_doubt_is_small_for_boxes_of_some_size() -> None:
    box = np.array([10, 10, 50, 50], np.float32)
    assert doubt(box, box[None]) < 2e-3


def test_the_right_answer_is_that_of_the_post_processor() -> None:
    outputs = raw(1, on_a_grid=False)
    for image in range(IMAGES):
        found, again = detections(outputs, SIZE, image=image), right(candidates(outputs, SIZE, image=image))
        np.testing.assert_array_equal(found.boxes, again.boxes)
