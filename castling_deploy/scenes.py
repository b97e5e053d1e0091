"""Scenes composed of handwritten digits, with exact boxes and masks: what dense networks are trained and scored on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DIGITS = (2, 5)  # least and most in one scene
SIDES = (0.14, 0.75)  # of a digit, of the canvas' shorter side; drawn so that small ones are as frequent as large ones
TRIES = 30  # to find a free place for a digit, before it is left out
INK = 0.4  # of full ink: where a pixel begins to belong to its digit
CONTRAST = 70.0  # at least, of 255, between the mean colours of ink and paper


@dataclass(frozen=True)
class Scene:
    """`image` (H, W, 3) uint8. `boxes` (n, 4) float32, x1 y1 x2 y2 in pixels, the tightest around each digit's mask;
    `labels` (n,) their classes 0..9. `mask` (H, W) int64: 0 where there is paper, 1 + class where there is a digit."""

    image: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]


def scenes(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    size: tuple[int, int],
    count: int,
    seed: int | list[int],
) -> tuple[Scene, ...]:
    """`count` scenes of `size` (height, width) pixels, of digits (n, 8, 8) with their labels (n,)."""
    generator = np.random.default_rng(seed)
    return tuple(compose(images, labels, size, generator) for _ in range(count))


def compose(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    size: tuple[int, int],
    generator: np.random.Generator,
) -> Scene:
    """One scene: digits in one colour each on paper of one colour, none over another, a little noise over all."""
    from PIL import Image

    paper = generator.uniform(0, 255, 3)
    canvas = np.broadcast_to(paper, (*size, 3)).copy()
    mask = np.zeros(size, np.int64)
    taken = np.zeros(size, bool)
    boxes, classes = [], []
    for _ in range(generator.integers(DIGITS[0], DIGITS[1] + 1)):
        for _ in range(TRIES):
            side = round(min(size) * SIDES[0] * (SIDES[1] / SIDES[0]) ** generator.uniform())
            top, left = (int(generator.integers(0, extent - side + 1)) for extent in size)
            place = slice(top, top + side), slice(left, left + side)
            if not taken[place].any():
                break
        else:
            continue
        chosen = generator.integers(len(images))
        digit = Image.fromarray(images[chosen]).resize((side, side), Image.Resampling.BILINEAR)
        ink = np.asarray(digit, np.float64)[..., None] / 255  # (side, side, 1)
        seen = ink[..., 0] > INK
        ys, xs = np.nonzero(seen)
        taken[place] = True
        canvas[place] += ink * (_colour_on(paper, generator) - paper)
        mask[place][seen] = 1 + labels[chosen]
        boxes.append((left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1))
        classes.append(labels[chosen])
    canvas += generator.normal(0, 4, canvas.shape)
    return Scene(
        np.rint(canvas.clip(0, 255)).astype(np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        mask,
    )


def _colour_on(paper: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """An ink that is seen on the paper."""
    while True:
        ink = generator.uniform(0, 255, 3)
        if abs(ink.mean() - paper.mean()) >= CONTRAST:
            return ink
