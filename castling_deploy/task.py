"""What a network's outputs mean: how they are scored, and which other outputs follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from castling_deploy.average_precision import average_precision
from castling_deploy.detection import detections
from castling_deploy.errors import UsageError
from castling_deploy.rechecking.replay import ROUNDING, replayed
from castling_deploy.scenes import Scene
from castling_deploy.suggest import did_you_mean

Outputs = Mapping[str, npt.NDArray[np.floating]]
Truth = npt.NDArray[np.int64] | tuple[Scene, ...]  # classes of images, or what is in each of them

# The largest error of what follows from a detector's outputs: pixels, scores (which are copied), classes.
LIMITS: Mapping[str, float] = {"boxes": ROUNDING, "scores": 1e-6, "labels": 0.5}


@dataclass(frozen=True)
class Derived:
    """What an output has to be that an artefact adds, given the artefact's other outputs.

    `limit` is the largest error allowed, in the output's own unit and whatever the artefact's precision; None: the
    artefact's tolerance, relative to the spread. `power` is that of the comparison; None: that of the output it follows
    from, since it may tell fewer images apart without harm.
    """

    expected: npt.NDArray[np.floating]
    limit: float | None = None
    power: float | None = None


class Task(Protocol):
    """One kind of network. `metric` names the score, in percent, more is better."""

    name: str
    metric: str

    def score(self, outputs: Outputs, truth: Truth | None, size: tuple[int, int]) -> float | None:
        """The metric on the images whose truth is known, which come first in every output; None without any.

        `size` (height, width) is that of the images, in pixels.
        """

    def derived(self, outputs: Outputs, size: tuple[int, int]) -> Mapping[str, Derived]:
        """The outputs that an artefact may add because they follow from the network's own, by name.

        `outputs` are the artefact's, the network's own and the added ones: what it adds is held against its own words,
        and these against the reference. `size` is (H, W) of the input in pixels.
        """


class Classification:
    """Logits (B, classes); an artefact may add their probabilities."""

    name = "classification"
    metric = "top-1"

    def score(self, outputs: Outputs, truth: Truth | None, size: tuple[int, int]) -> float | None:
        if not isinstance(truth, np.ndarray):
            return None
        return float(100 * (outputs["logits"][: len(truth)].argmax(1) == truth).mean())

    def derived(self, outputs: Outputs, size: tuple[int, int]) -> Mapping[str, Derived]:
        logits = outputs["logits"].astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return {"probabilities": Derived(powers / powers.sum(axis=1, keepdims=True))}


class Detection:
    """Raw heads: scores and box distributions per level; castling_deploy.detection makes boxes of them, and so may an
    artefact."""

    name = "detection"
    metric = "mAP"

    def score(self, outputs: Outputs, truth: Truth | None, size: tuple[int, int]) -> float | None:
        if not isinstance(truth, tuple):
            return None
        found = [detections(outputs, size, image=image) for image in range(len(truth))]
        return average_precision(found, truth)

    def derived(self, outputs: Outputs, size: tuple[int, int]) -> Mapping[str, Derived]:
        if not LIMITS.keys() <= outputs.keys():
            return {}
        expected = replayed(outputs, size)
        power = float(expected["scores"].any())  # 0 where nothing was seen: then nothing was compared
        return {name: Derived(expected[name], limit, power) for name, limit in LIMITS.items()}


class Segmentation:
    """Logits (B, classes, H, W) of every pixel's class."""

    name = "segmentation"
    metric = "mIoU"

    def score(self, outputs: Outputs, truth: Truth | None, size: tuple[int, int]) -> float | None:
        if not isinstance(truth, tuple):
            return None
        return mean_iou(outputs["logits"][: len(truth)].argmax(1), np.stack([scene.mask for scene in truth]))

    def derived(self, outputs: Outputs, size: tuple[int, int]) -> Mapping[str, Derived]:
        return {}


def mean_iou(found: npt.NDArray[np.integer], truth: npt.NDArray[np.integer]) -> float:
    """Intersection over union of the pixels of a class in all images together, averaged over the classes that there
    are, in percent. Shape: (P, H, W) class indices each."""
    ious = []
    for label in np.unique(truth):
        one, other = found == label, truth == label
        ious.append((one & other).sum() / (one | other).sum())
    return float(100 * np.mean(ious))


TASKS: Mapping[str, Task] = {task.name: task for task in (Classification(), Detection(), Segmentation())}


def task_named(name: str) -> Task:
    """The task called `name`. Raises UsageError with a suggestion."""
    if name not in TASKS:
        raise UsageError(f"unknown task '{name}'", hint=did_you_mean(name, TASKS))
    return TASKS[name]
