"""What outputs mean: scores and what follows from them."""

from __future__ import annotations

import numpy as np
import pytest

from castling_deploy import bundled
from castling_deploy.errors import UsageError
from castling_deploy.scenes import Scene, scenes
from castling_deploy.task import Classification, Detection, Segmentation, mean_iou, task_named

SIZE = (64, 96)


def test_top1_counts_the_labelled_images_only() -> None:
    logits = np.eye(3, dtype=np.float32)
    assert Classification().score({"logits": logits}, np.array([0, 2]), SIZE) == 50
    assert Classification().score({"logits": logits}, None, SIZE) is None


def test_probabilities_follow_from_logits_and_nothing_else_does() -> None:
    logits = np.array([[1e4, 1e4, -1e4], [0.0, np.log(3.0), -np.inf]])
    derived = Classification().derived({"logits": logits}, (32, 32))
    assert derived.keys() == {"probabilities"}
    np.testing.assert_allclose(derived["probabilities"].expected, [[0.5, 0.5, 0], [0.25, 0.75, 0]])


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        task_named("clasification")
    assert "'classification'" in (caught.value.hint or "")


def test_mean_iou_of_a_hand_computed_toy() -> None:
    truth = np.array([[[0, 0, 1], [0, 2, 2]]])
    found = np.array([[[0, 1, 1], [0, 2, 3]]])  # a class that is nowhere in the truth counts through what it misses
    assert mean_iou(found, truth) == pytest.approx(100 * (2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert mean_iou(truth, truth) == 100


def test_segmentation_is_scored_on_the_scenes_whose_truth_is_known() -> None:
    images, labels = bundled.digits()
    truth = scenes(images, labels, SIZE, 3, seed=1)
    perfect = np.stack([np.eye(11)[scene.mask].transpose(2, 0, 1) for scene in truth])
    logits = np.concatenate([perfect, np.zeros((2, 11, *SIZE))])  # two more images, of nothing
    assert Segmentation().score({"logits": logits}, truth, SIZE) == 100
    assert Segmentation().score({"logits": logits[:, ::-1]}, truth, SIZE) == 0
    assert Segmentation().score({"logits": logits}, None, SIZE) is None


def answers(truth: tuple[Scene, ...], shift: float = 0.0) -> dict[str, np.ndarray]:
    """A detector's outputs that say exactly what is in the scenes, boxes moved right by `shift` pixels."""
    cells, bins = SIZE[0] * SIZE[1], 128  # stride 1: every box side is a whole number of cells from some cell, plus 1/2
    scores = np.zeros((len(truth), cells, 10), np.float32)
    distances = np.full((len(truth), cells, 4, bins), -50.0, np.float32)
    for image, scene in enumerate(truth):
        for label, (left, top, right, bottom) in zip(scene.labels, scene.boxes):
            x, y = int(left + right) // 2, int(top + bottom) // 2
            scores[image, y * SIZE[1] + x, label] = 0.9
            for side, reach in enumerate((x + 0.5 - left, y + 0.5 - top, right - x - 0.5, bottom - y - 0.5)):
                reach += (-shift, 0, shift, 0)[side]
                low = int(reach)
                share = reach - low
                place = distances[image, y * SIZE[1] + x, side]
                place[low], place[low + 1] = np.log(1 - share + 1e-30), np.log(share + 1e-30)
    return {"cls_pred_stride_1": scores, "dis_pred_stride_1": distances.reshape(len(truth), cells, 4 * bins)}


def test_mean_average_precision_is_cocos() -> None:
    images, labels = bundled.digits()
    truth = scenes(images, labels, SIZE, 8, seed=2)
    assert Detection().score(answers(truth), truth, SIZE) == pytest.approx(100)
    moved = Detection().score(answers(truth, shift=1.0), truth, SIZE)
    assert moved is not None and 20 < moved < 90  # the stricter thresholds are missed
    swapped = answers(truth)
    swapped["cls_pred_stride_1"] = np.roll(swapped["cls_pred_stride_1"], 1, axis=-1)
    assert Detection().score(swapped, truth, SIZE) == pytest.approx(0)
    nothing = {name: np.full_like(values, -50) for name, values in answers(truth).items()}
    assert Detection().score(nothing, truth, SIZE) == 0
    assert Detection().score(answers(truth), None, SIZE) is None


def test_scenes_are_the_same_every_time_and_their_truth_is_exact() -> None:
    images, labels = bundled.digits()
    first, again = (scenes(images, labels, SIZE, 20, seed=3) for _ in range(2))
    for scene, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(scene.image, other.image)
        assert scene.image.shape == (*SIZE, 3) and scene.image.dtype == np.uint8
        assert len(scene.labels) >= 1
        covered = np.zeros(SIZE, bool)
        for (left, top, right, bottom), label in zip(scene.boxes.astype(int), scene.labels):
            inside = scene.mask[top:bottom, left:right] == 1 + label
            assert inside.any(axis=0)[[0, -1]].all() and inside.any(axis=1)[[0, -1]].all()  # the box is tight
            covered[top:bottom, left:right] |= inside
        assert not scene.mask[~covered].any()
