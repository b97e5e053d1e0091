"""The inputs that every comparison is made on: real images first, then the structured ones that break exports.

Random noise alone is not enough: an export by one toolchain passed on noise and was off by 10 on a photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from castling_deploy import bundled
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.scenes import scenes
from castling_deploy.task import Truth

SCENES = 64  # composed of the held-out digits, about 200 of them
MEMORY = 2**28  # bytes of float32 outputs; about ten such arrays exist at once
LEAST = 3  # real images: three pairs to tell apart
EXTREME = 4.0  # how far the scaled probes leave the range of normalised pixels; only for artefacts that take tensors


@dataclass(frozen=True)
class Probes:
    """`images` (P, H, W, C) uint8, at the network's size; the first `real` of them are photographs or scans.

    `extremes` more inputs are the first real images, normalised and then multiplied by EXTREME: an artefact that takes
    tensors has to compute them too. `truth` (real,) is known for the bundled networks.
    """

    preprocessing: Preprocessing
    images: npt.NDArray[np.uint8]
    real: int
    extremes: int
    truth: Truth | None

    @staticmethod
    def of(images: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Probes:
        """Real images (P, H, W, C) at the network's size, and nothing else."""
        return Probes(preprocessing, images, real=len(images), extremes=0, truth=None)

    @cached_property
    def tensors(self) -> npt.NDArray[np.float32]:
        """(P + extremes, C, H, W) float32: what an artefact that takes tensors is fed."""
        plain = self.preprocessing.normalised(self.images)
        return np.concatenate([plain, plain[: self.extremes] * np.float32(EXTREME)])

    def few(self, count: int) -> Probes:
        """`count` real images and the structured ones, for what is too slow to run on all."""
        keep = min(count, self.real)
        return replace(
            self,
            images=np.concatenate([self.images[:keep], self.images[self.real :]]),
            real=keep,
            extremes=min(self.extremes, keep),
            truth=None if self.truth is None else self.truth[:keep],
        )

    def rows(self, few: Probes) -> list[int]:
        """Which of these inputs, in the order of `tensors`, those of `self.few(...)` or `self.at_most(...)` are."""
        structured = range(self.real, self.real + len(few.images) - few.real)
        return [*range(few.real), *structured, *(len(self.images) + extreme for extreme in range(few.extremes))]

    def affordable(self, values: int) -> Probes:
        """As many of them as keep the outputs of a network, `values` numbers per image, below MEMORY bytes. A segmenter
        of 150 classes returns 157 MB for 512 x 512 pixels."""
        return self.at_most(MEMORY // (4 * values))

    def at_most(self, count: int) -> Probes:
        """`count` of them, half of them real; LEAST real images and one structured and one extreme in any case."""
        if count >= len(self.images) + self.extremes:
            return self
        few = self.few(max(LEAST, min(self.real, count // 2)))
        structured = max(1, count - few.real - few.extremes)
        return replace(few, images=few.images[: few.real + structured], extremes=min(few.extremes, structured))


def probes_for(preprocessing: Preprocessing, samples: str | None, seed: int = 0) -> Probes:
    """The probes of a network: the bundled images it was trained for, or photographs; and the structured ones.

    `seed` is that of the noise among them.
    """
    truth: Truth | None = None
    pictures: Sequence[npt.NDArray[np.uint8]] = tuple(bundled.photographs())
    if samples == "digits":
        images, labels = bundled.digits()
        pictures, truth = tuple(images), labels.astype(np.int64)
    elif samples == "scenes":
        truth = scenes(*bundled.digits(), preprocessing.size, SCENES, seed=0)
    if isinstance(truth, tuple):  # composed at the network's size already
        real = np.stack([scene.image for scene in truth])
    else:
        real = np.stack([preprocessing.resized(picture) for picture in pictures])
    return Probes(
        preprocessing,
        np.concatenate([real, structured(preprocessing.size, real.shape[-1], seed)]),
        real=len(real),
        extremes=2,
        truth=truth,
    )


def structured(size: tuple[int, int], channels: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Flat gray, black, white, one saturated image per channel, ramps, a checkerboard, noise: (n, H, W, C) uint8."""
    height, width = size
    generator = np.random.default_rng(seed)
    flat = [np.full((height, width, channels), value, np.uint8) for value in (128, 0, 255)]
    saturated = [np.zeros((height, width, channels), np.uint8) for _ in range(channels)]
    for channel, image in enumerate(saturated):
        image[..., channel] = 255
    down, across = np.linspace(0, 255, height).astype(np.uint8), np.linspace(0, 255, width).astype(np.uint8)
    ramps = [np.broadcast_to(down[:, None, None], flat[0].shape), np.broadcast_to(across[None, :, None], flat[0].shape)]
    rows, columns = np.indices(size)
    checkerboard = np.repeat((((rows // 4 + columns // 4) % 2) * 255).astype(np.uint8)[..., None], channels, axis=-1)
    noise = generator.integers(0, 256, (2, height, width, channels), np.uint8)
    return np.stack([*flat, *saturated, *ramps, checkerboard, *noise])
