"""What an artefact's boxes have to be, given its own raw outputs.

Suppression is discontinuous: an overlap on the edge, or two equal scores, may be decided either way by correct
arithmetic, and everything after follows. The rule is therefore replayed with the artefact's answer at hand: where
rounding leaves a choice, its choice is taken, everywhere else the rule decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from castling_deploy.detection import IOU, KEEP, Detections, Floats, Indices, candidates, overlaps, strides_of

ROUNDING = 2.0**-9  # pixels; a coordinate of 640 in float32 is decoded to 2^-12, in float16 to 2^-2
NO_LABEL = -1  # in the rows that no detection fills
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.intp))


def replayed(
    outputs: Mapping[str, npt.NDArray[Any]], image_size: tuple[int, int]
) -> dict[str, npt.NDArray[np.floating]]:
    """`boxes` (P, K, 4), `scores` (P, K) and `labels` (P, K) as they have to be: what castling_deploy.detection makes
    of the raw outputs, or as good an answer nearer to the artefact's. K is 100, or the number of (cell, class) pairs.

    `outputs` holds raw outputs and the artefact's own three. `image_size` is (H, W) of the input. Raises ShapeError.
    """
    shapes = [outputs[f"cls_pred_stride_{stride}"].shape for stride in strides_of(outputs)]
    images, keep = shapes[0][0], min(KEEP, sum(cells * classes for _, cells, classes in shapes))
    expected = {
        "boxes": np.zeros((images, keep, 4), np.float32),
        "scores": np.zeros((images, keep), np.float32),
        "labels": np.full((images, keep), NO_LABEL, np.float32),
    }
    readable = all(outputs[name].shape == values.shape for name, values in expected.items())
    for image in range(images):
        found = candidates(outputs, image_size, image=image)
        seen = Detections(*(outputs[name][image] for name in ("boxes", "scores", "labels"))) if readable else NOTHING
        kept = nearest(found, seen, IOU, keep)
        for name, values in (("boxes", found.boxes), ("scores", found.scores), ("labels", found.labels)):
            expected[name][image, : len(kept)] = values[kept]
    return expected


def nearest(found: Detections, seen: Detections, iou: float, keep: int) -> Indices:
    """`detection.suppressed`, deciding as `seen` did wherever rounding may decide either way.

    Of equal scores, those in `seen` come first, in its order. An overlap with a better box that is within its `doubt`
    of `iou` lets a box stay only where `seen` has it.
    """
    row = _rows(found, seen)
    asked = row < len(seen)
    order = np.lexsort((row, -found.scores))
    kept: list[np.intp] = []
    while len(order) and len(kept) < keep:
        best, order = order[0], order[1:]
        kept.append(best)
        rivals = found.boxes[order]
        slack = doubt(found.boxes[best], rivals) * np.where(asked[order], 1, -1)
        falls = overlaps(found.boxes[best], rivals) > iou + slack
        order = order[~(falls & (found.labels[order] == found.labels[best]))]
    return np.array(kept, np.intp)


def _rows(found: Detections, seen: Detections) -> Indices:
    """For each of `found` the row in which `seen` has it, len(seen) where it has not; each row has one at most.

    Scores are only copied, so they are equal; boxes may differ by ROUNDING.
    """
    row = np.full(len(found), len(seen))
    for index in range(len(seen)):
        same = (found.scores == seen.scores[index]) & (found.labels == seen.labels[index]) & (row == len(seen))
        (places,) = same.nonzero()
        distances = np.abs(found.boxes[places] - seen.boxes[index]).max(1)
        if len(places) and distances.min() <= ROUNDING:
            row[places[distances.argmin()]] = index
    return row


def doubt(box: Floats, boxes: Floats) -> Floats:
    """How far the overlaps of one box (4,) with each of (n, 4) move, at most, when every coordinate moves by ROUNDING.

    The sides of a box and of an intersection change by 2 ROUNDING, its area by that times half its circumference:
    d(I / U) <= (dI + dU) / U with dU <= dA + dB + dI.
    """
    corners = np.concatenate([np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])], axis=1)
    sides = [(each[:, 2:] - each[:, :2]).clip(0) + 2 * ROUNDING for each in (box[None], boxes, corners)]
    first, second, shared = (2 * ROUNDING * each.sum(1) for each in sides)
    areas = [each.prod(1) for each in sides]
    union = areas[0] + areas[1] - areas[2]
    return np.asarray((2 * shared + first + second) / union, np.float32)
