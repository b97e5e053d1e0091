"""Mean average precision of boxes by the COCO evaluator of pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from castling_deploy.detection import Detections
from castling_deploy.quiet import captured

if TYPE_CHECKING:
    from castling_deploy.scenes import Scene


def average_precision(found: Sequence[Detections], truth: Sequence[Scene]) -> float:
    """AP in percent, averaged over classes and over IoU 0.50, 0.55, ..., 0.95 (COCO's headline number).

    `found[i]` are the detections in the image of `truth[i]`, in its pixels.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes = [
        (image, label, box)
        for image, scene in enumerate(truth)
        for label, box in zip(scene.labels.tolist(), scene.boxes.tolist(), strict=True)
    ]
    guesses = [
        {"image_id": image, "category_id": label, "bbox": _xywh(box), "score": score}
        for image, seen in enumerate(found)
        for label, box, score in zip(seen.labels.tolist(), seen.boxes.tolist(), seen.scores.tolist(), strict=True)
    ]
    if not guesses:
        return 0.0
    with captured():  # it prints its progress
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(truth))],
            "categories": [{"id": label} for label in sorted({label for _, label, _ in boxes})],
            "annotations": [
                # numbered from 1: the evaluator takes an annotation called 0 for no match
                {
                    "id": number,
                    "image_id": image,
                    "category_id": label,
                    "bbox": _xywh(box),
                    "area": _area(box),
                    "iscrowd": 0,
                }
                for number, (image, label, box) in enumerate(boxes, 1)
            ],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(guesses), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def _xywh(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _area(box: Sequence[float]) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)
