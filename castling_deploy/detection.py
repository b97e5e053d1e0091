"""From a detector's raw outputs to boxes: decoding and class-aware suppression, in numpy alone.

An artefact ends at scores and distances per feature level: what follows has data-dependent shapes, and coordinates over
256 pixels lose precision in float16. The rules and defaults are those of mmdet and PaddleDetection for PicoDet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from castling_deploy.errors import ShapeError

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

SCORES = re.compile(r"cls_pred_stride_(\d+)")
SCORE, PER_LEVEL, IOU, KEEP = 0.025, 1000, 0.6, 100  # what mmdet and PaddleDetection ask for


@dataclass(frozen=True)
class Detections:
    """What is seen in one image, best first: `boxes` (n, 4) float32, x1 y1 x2 y2 in pixels of the image, `scores` (n,)
    float32 in 0..1, `labels` (n,) class indices."""

    boxes: Floats
    scores: Floats
    labels: Indices

    def __len__(self) -> int:
        return len(self.scores)


def detections(
    outputs: Mapping[str, npt.NDArray[Any]],
    image_size: tuple[int, int],
    scale: tuple[float, float] = (1.0, 1.0),
    *,
    image: int = 0,
    score: float = SCORE,
    per_level: int = PER_LEVEL,
    iou: float = IOU,
    keep: int = KEEP,
) -> Detections:
    """The detections in one image of a batch.

    `outputs` has, per stride s, `cls_pred_stride_{s}` (B, N, classes), scores in 0..1, and `dis_pred_stride_{s}`
    (B, N, 4 * bins), logits; N = ceil(H / s) * ceil(W / s), `image_size` (H, W) being the network's input in pixels.
    `scale` is (height, width) of that input over those of the original image; boxes come back in the original's pixels.

    Candidates are the (cell, class) pairs with more than `score`, at most `per_level` of every level. A box falls to a
    better one of its class when their intersection over union exceeds `iou`. Equal scores: finer level, earlier cell,
    lower class first. Raises ShapeError.
    """
    found = candidates(outputs, image_size, image=image, score=score, per_level=per_level)
    kept = suppressed(found, iou, keep)
    height_scale, width_scale = scale
    factors: Floats = np.array([width_scale, height_scale] * 2, np.float32)
    return Detections(found.boxes[kept] / factors, found.scores[kept], found.labels[kept])


def candidates(
    outputs: Mapping[str, npt.NDArray[Any]],
    image_size: tuple[int, int],
    *,
    image: int = 0,
    score: float = SCORE,
    per_level: int = PER_LEVEL,
) -> Detections:
    """What `detections` suppresses from: the candidates of every level, finer levels first, each level's best first.

    Boxes are in pixels of the network's input. Raises ShapeError.
    """
    levels = [
        _candidates(
            _of_image(outputs, f"cls_pred_stride_{stride}", image),
            _of_image(outputs, f"dis_pred_stride_{stride}", image),
            stride,
            image_size,
            score,
            per_level,
        )
        for stride in strides_of(outputs)
    ]
    return Detections(
        np.concatenate([level.boxes for level in levels]),
        np.concatenate([level.scores for level in levels]),
        np.concatenate([level.labels for level in levels]),
    )


def decoded(distances: Floats, stride: int, image_size: tuple[int, int]) -> Floats:
    """Boxes of one level, (N, 4 * bins) logits -> (N, 4) x1 y1 x2 y2 pixels inside the image (arXiv:2006.04388).

    The distance of a side from its cell's centre is the mean of a softmax distribution over 0, 1, ... strides.
    """
    height, width = image_size
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    if len(distances) != rows * columns or distances.shape[1] % 4:
        raise ShapeError(
            f"distances of stride {stride} have shape {distances.shape}, an image of {height} x {width} pixels "
            f"has {rows} x {columns} cells",
            hint="pass the size of the network's input, and distances of 4 sides times the number of bins",
        )
    logits = distances.reshape(len(distances), 4, -1)  # (N, 4, bins)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    steps = np.arange(logits.shape[-1], dtype=np.float32)
    left, top, right, bottom = (stride * (weights @ steps) / weights.sum(-1)).T
    x, y = centres(stride, image_size).T
    boxes = np.stack([x - left, y - top, x + right, y + bottom], axis=1)
    return boxes.clip(0, np.array([width, height] * 2, np.float32))


def centres(stride: int, image_size: tuple[int, int]) -> Floats:
    """The centres of a level's cells, (N, 2) x y in pixels, row by row."""
    height, width = image_size
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    y, x = (np.mgrid[:rows, :columns].reshape(2, -1).astype(np.float32) + np.float32(0.5)) * np.float32(stride)
    return np.stack([x, y], axis=1)


def suppressed(found: Detections, iou: float, keep: int) -> Indices:
    """Indices of what remains, best first, at most `keep`: greedy non-maximum suppression inside every class.

    A box without area overlaps nothing. Equal scores keep their order.
    """
    order = np.argsort(-found.scores, kind="stable")
    kept: list[np.intp] = []
    while len(order) and len(kept) < keep:
        best, order = order[0], order[1:]
        kept.append(best)
        rival = found.labels[order] == found.labels[best]
        order = order[~(rival & (overlaps(found.boxes[best], found.boxes[order]) > iou))]
    return np.array(kept, np.intp)


def overlaps(box: Floats, boxes: Floats) -> Floats:
    """Intersection over union of one box (4,) with each of (n, 4); 0 where neither has an area."""
    shared = _area(np.concatenate([np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])], axis=1))
    union = _area(box[None]) + _area(boxes) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _area(boxes: Floats) -> Floats:
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
    return sides[:, 0] * sides[:, 1]


def _candidates(
    scores: Floats, distances: Floats, stride: int, image_size: tuple[int, int], score: float, per_level: int
) -> Detections:
    """The (cell, class) pairs of one level, overlapping as they are."""
    boxes = decoded(distances, stride, image_size)
    if len(scores) != len(boxes):
        raise ShapeError(
            f"stride {stride} has scores of {len(scores)} cells and distances of {len(boxes)}",
            hint="pass the outputs of one network",
        )
    cells, labels = np.nonzero(scores > score)
    values = scores[cells, labels]
    best = np.argsort(-values, kind="stable")[:per_level]
    return Detections(boxes[cells[best]], values[best], labels[best])


def strides_of(outputs: Mapping[str, Any]) -> list[int]:
    """The strides of a detector's levels, finest first, from the names of its outputs. Raises ShapeError."""
    strides = sorted(int(match[1]) for match in map(SCORES.fullmatch, outputs) if match)
    if not strides:
        raise ShapeError(
            f"no scores among the outputs {', '.join(outputs) or '(none)'}",
            hint="pass a detector's outputs by name: cls_pred_stride_8, dis_pred_stride_8, ...",
        )
    return strides


def _of_image(outputs: Mapping[str, npt.NDArray[Any]], name: str, image: int) -> Floats:
    """One image of an output (B, N, K), as float32 (N, K): float16 would round coordinates over 256 pixels."""
    if name not in outputs or outputs[name].ndim != 3 or not 0 <= image < len(outputs[name]):
        shape = outputs[name].shape if name in outputs else None
        raise ShapeError(
            f"output '{name}' is missing" if shape is None else f"image {image} of '{name}' {shape} cannot be read",
            hint="outputs are (B, cells, values); image counts from 0",
        )
    return outputs[name][image].astype(np.float32)
