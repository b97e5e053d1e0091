"""Decoding against a two-level toy worked out by hand, suppression against a brute-force one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from castling_deploy.detection import Detections, decoded, detections, overlaps, suppressed
from castling_deploy.errors import ShapeError
from castling_deploy.models.pico_head import Integral

NEVER = -100.0  # a logit whose probability is 0 in float32
QUARTER = [np.log(3), np.log(1), NEVER]  # of one stride: 3/4 at 0, 1/4 at 1
HALF = [0, 0, NEVER]
ONE = [0, np.log(2), 0]  # 1/4 at 0, 1/2 at 1, 1/4 at 2


def toy() -> dict[str, npt.NDArray[np.float32]]:
    """16 x 24 pixels: 2 x 3 cells of stride 8, 1 x 2 of stride 16 (the last one half outside); 2 classes, 3 bins."""
    cls8, dis8 = np.zeros((1, 6, 2)), np.zeros((1, 6, 12))
    cls8[0, 1] = 0.9, 0.3  # row 0, column 1: centre (12, 4)
    dis8[0, 1] = [*QUARTER, *HALF, *ONE, *QUARTER]  # 2, 4, 8, 2 pixels
    cls8[0, 3] = 0.025, 0.0  # exactly the threshold: not above it
    cls8[0, 5] = 0.0, 0.8  # row 1, column 2: centre (20, 12)
    dis8[0, 5] = [*ONE, *ONE, *ONE, *ONE]  # 8 pixels each way, beyond the image right and below
    cls16, dis16 = np.zeros((1, 2, 2)), np.zeros((1, 2, 12))
    cls16[0, 0] = 0.6, 0.0  # centre (8, 8)
    dis16[0, 0] = [*HALF, *HALF, *HALF, *QUARTER]  # 8, 8, 8, 4 pixels
    return {
        name: value.astype(np.float32)
        for name, value in {
            "dis_pred_stride_16": dis16,
            "cls_pred_stride_16": cls16,
            "cls_pred_stride_8": cls8,
            "dis_pred_stride_8": dis8,
        }.items()
    }


def random_boxes(count: int, seed: int, classes: int = 3) -> Detections:
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    scores = (rng.integers(1, 50, count) / 50).astype(np.float32)  # many ties
    return Detections(boxes, scores, rng.integers(0, classes, count))


def brute_force(found: Detections, iou: float) -> list[int]:
    """Every pair compared, in plain Python: a box stays unless a better one of its class that stays covers it."""

    def shared_share(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
        wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(wide, np.float32(0)) * max(high, np.float32(0))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        return float(shared / union) if union > 0 else 0.0

    stay: list[int] = []
    for index in sorted(range(len(found)), key=lambda i: (-found.scores[i], i)):
        rivals = (other for other in stay if found.labels[other] == found.labels[index])
        if all(shared_share(found.boxes[other], found.boxes[index]) <= iou for other in rivals):
            stay.append(index)
    return stay


def test_a_two_level_toy_is_decoded_as_by_hand() -> None:
    found = detections(toy(), (16, 24))
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.6, 0.3])
    assert found.labels.tolist() == [0, 1, 0, 1]
    expected = [[10, 0, 20, 6], [12, 4, 24, 16], [0, 0, 16, 12], [10, 0, 20, 6]]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-5)
    assert found.boxes.dtype == found.scores.dtype == np.float32


def test_boxes_come_back_in_the_original_images_pixels() -> None:
    """The image was 32 high and 12 wide: halved along its height, doubled along its width."""
    found = detections(toy(), (16, 24), scale=(0.5, 2.0))
    np.testing.assert_allclose(found.boxes[0], [5, 0, 10, 12], atol=1e-5)


def test_decoding_agrees_with_the_heads_integral() -> None:
    distances = np.random.default_rng(0).normal(size=(4 * 5, 32)).astype(np.float32)
    boxes = decoded(distances, 8, (32, 40))
    sides = 8 * Integral(7)(torch.from_numpy(distances)).numpy()
    x, y = 8 * (np.arange(20) % 5 + 0.5), 8 * (np.arange(20) // 5 + 0.5)
    expected = np.stack([x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]], axis=1)
    np.testing.assert_allclose(boxes, expected.clip(0, [40, 32, 40, 32]), atol=1e-4)


def test_half_precision_outputs_are_decoded_in_float32() -> None:
    distances = np.zeros((1, 80 * 80, 32), np.float16)  # 3.5 strides each way
    scores = np.zeros((1, 80 * 80, 1), np.float16)
    scores[0, 70 * 80 + 70] = 0.5
    found = detections({"cls_pred_stride_8": scores, "dis_pred_stride_8": distances}, (640, 640))
    assert found.boxes.tolist() == [[564 - 28, 564 - 28, 564 + 28, 564 + 28]]


def test_large_logits_do_not_overflow() -> None:
    logits = np.full((1, 4, 3), -3e4, np.float32)
    logits[:, :, 1] = 3e4
    assert decoded(logits.reshape(1, 12), 16, (16, 16)).tolist() == [[0, 0, 16, 16]]


def test_every_image_of_a_batch_has_its_own_detections() -> None:
    batch = {name: np.concatenate([np.zeros_like(value), value]) for name, value in toy().items()}
    assert len(detections(batch, (16, 24), image=0)) == 0
    np.testing.assert_array_equal(detections(batch, (16, 24), image=1).boxes, detections(toy(), (16, 24)).boxes)


def test_nothing_above_the_threshold_is_an_empty_answer_with_its_shapes() -> None:
    found = detections(toy(), (16, 24), score=0.95)
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)
    assert found.boxes.dtype == np.float32 and found.labels.dtype == np.intp


def test_every_level_gives_its_best_candidates_only() -> None:
    found = detections(toy(), (16, 24), per_level=1)
    np.testing.assert_allclose(found.scores, [0.9, 0.6])  # one of stride 8, one of stride 16
    assert len(detections(toy(), (16, 24), keep=2)) == 2


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_suppression_agrees_with_brute_force(seed: int, iou: float) -> None:
    found = random_boxes(300, seed)
    assert suppressed(found, iou, 1000).tolist() == brute_force(found, iou)
    assert suppressed(found, iou, 20).tolist() == brute_force(found, iou)[:20]


def test_boxes_on_top_of_each_other_leave_one_per_class() -> None:
    boxes = np.tile(np.array([[1, 1, 9, 9]], np.float32), (6, 1))
    scores = np.array([0.1, 0.5, 0.9, 0.2, 0.8, 0.3], np.float32)
    assert suppressed(Detections(boxes, scores, np.array([0, 1, 0, 1, 1, 0])), 0.6, 100).tolist() == [2, 4]


def test_equal_scores_keep_their_order() -> None:
    boxes = np.array([[0, 0, 8, 8], [0, 0, 8, 8], [20, 20, 28, 28]], np.float32)
    found = Detections(boxes, np.full(3, 0.5, np.float32), np.zeros(3, np.intp))
    assert suppressed(found, 0.6, 100).tolist() == [0, 2]


def test_the_overlap_has_to_exceed_the_threshold() -> None:
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)  # exactly one half
    found = Detections(boxes, np.array([0.9, 0.8], np.float32), np.zeros(2, np.intp))
    assert suppressed(found, 0.5, 100).tolist() == [0, 1]
    assert suppressed(found, 0.49, 100).tolist() == [0]


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = np.array([[3, 3, 3, 3], [3, 3, 3, 3], [0, 5, 9, 5], [0, 0, 9, 9], [9, 9, 0, 0]], np.float32)
    assert all(overlaps(box, boxes)[[0, 1, 2, 4]].max() == 0 for box in boxes)
    found = Detections(boxes, np.linspace(1, 0.5, 5, dtype=np.float32), np.zeros(5, np.intp))
    assert suppressed(found, 0.6, 100).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: outputs.clear(), "no scores"),
        (lambda outputs: outputs.pop("dis_pred_stride_8"), "'dis_pred_stride_8' is missing"),
        (lambda outputs: outputs.update(dis_pred_stride_8=np.zeros((1, 4, 12))), "2 x 3 cells"),
        (lambda outputs: outputs.update(dis_pred_stride_8=np.zeros((1, 6, 13))), "2 x 3 cells"),
        (lambda outputs: outputs.update(cls_pred_stride_8=np.zeros((1, 5, 2))), "scores of 5 cells"),
        (lambda outputs: outputs.update(cls_pred_stride_8=np.zeros((6, 2))), "cannot be read"),
    ],
)
def test_outputs_that_do_not_belong_together_are_refused(change: object, message: str) -> None:
    outputs = toy()
    change(outputs)  # type: ignore[operator]
    with pytest.raises(ShapeError, match=message) as caught:
        detections(outputs, (16, 24))
    assert caught.value.hint


def test_an_image_beyond_the_batch_is_refused() -> None:
    with pytest.raises(ShapeError, match="image 1 of 'cls_pred_stride_8'"):
        detections(toy(), (16, 24), image=1)
