"""Preprocessing or model? A photo, what somebody's own code made of it, and what the artefact says of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from castling_deploy.artifact import Folder, read_folder
from castling_deploy.attribution.mistakes import Candidate, Pixels, Reading, candidates, frames, readings
from castling_deploy.errors import ShapeError, UsageError
from castling_deploy.execution import inputs_for, run_artifact
from castling_deploy.parity import Array, Reference, Verdict, WitnessReport
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import Probes
from castling_deploy.rechecking import recheck
from castling_deploy.target import target_named
from castling_deploy.verification import opened

MATTERS = 0.02  # of an output's spread: what float16 arithmetic may cost (parity.TOLERANCES)
SCREENED = 4096  # pixels, at least, that all combinations of mistakes are looked at; the best ones at all pixels
NEAR = 1.1, 0.02  # of two explanations that are so close (a factor, then levels), the one with fewer mistakes
SAME = 2.0  # levels on average; JPEG decoders differ by less
EXPLAINS = 0.5  # of the difference has to go, for mistakes to explain it
SHOWN = 3  # explanations in all


class Cause(StrEnum):
    """Where an error comes from."""

    MODEL = "model"
    PREPROCESSING = "preprocessing"
    NEITHER = "neither"


@dataclass(frozen=True)
class Explanation:
    """What was done wrong, and how far the user's pixels are from pixels made in that way, in levels on average."""

    mistakes: tuple[str, ...]
    levels: float


@dataclass(frozen=True)
class Effect:
    """An output on the user's pixels against the same on ours: the largest difference over the spread. `ours` and
    `theirs` are the first classes, where the output is one number per class."""

    name: str
    rel: float | None
    ours: str | None = None
    theirs: str | None = None


@dataclass(frozen=True)
class Attribution:
    """What was found. Levels are of 0..255, after the user's normalisation was taken back by the artefact's numbers.

    `golden` is the artefact on its golden images, where no preprocessing of theirs takes part. `explanation` is the
    simplest that fits; its mistakes are empty where the pixels are ours, or (not `explained`) where nothing known fits.
    """

    golden: WitnessReport
    mean_levels: float
    largest_levels: float
    explanation: Explanation
    explained: bool
    others: tuple[Explanation, ...]
    effects: tuple[Effect, ...]

    @property
    def cause(self) -> Cause:
        """Preprocessing is to blame from MATTERS on, the model where its golden outputs are wrong."""
        if self.golden.verdict is Verdict.FAIL:
            return Cause.MODEL
        rels = [effect.rel for effect in self.effects if effect.rel is not None]
        return Cause.PREPROCESSING if max(rels, default=0.0) > MATTERS else Cause.NEITHER


def attribute(path: str | Path, image: str | Path, theirs: npt.NDArray[np.generic]) -> Attribution:
    """Compare `theirs` with what the artefact's own preprocessing makes of the file `image`.

    `theirs` is one image: uint8 pixels at the network's size, or a normalised tensor; (H, W, C) or (C, H, W), with or
    without a batch axis of 1. Raises ShapeError for another size, UsageError for a file that is no picture, and what
    `recheck.verify` raises.
    """
    folder = read_folder(Path(path))
    pre, (spec,) = folder.preprocessing, folder.artifact.inputs
    photo, rotated = picture(Path(image))
    array = _one_image(theirs, pre, photo)
    right, *wrong = list(readings(array, pre, spec))
    pixels, *others = list(candidates(photo, pre, rotated))
    if right.mistakes:  # another layout than the artefact's: nothing in it is right
        wrong = [right, *wrong]
    ranked = _ranked([right, *wrong], [pixels, *others])
    apart = np.abs(right.levels - pixels.pixels)
    best = _simplest(ranked)
    own = Explanation(right.mistakes, float(apart.mean()))
    explained = best.levels <= (SAME if len(best.mistakes) <= len(own.mistakes) else EXPLAINS * own.levels)
    golden = recheck.verify(path).golden[0]
    return Attribution(
        golden,
        float(apart.mean()),
        float(apart.max()),
        best if explained else own,
        explained,
        tuple(each for each in ranked if each != best)[: SHOWN - 1],
        _effects(folder, pixels.pixels, array, right.layout),
    )


def prepared(path: str | Path, image: str | Path) -> npt.NDArray[np.generic]:
    """What the artefact takes of an image file: (1, H, W, C) uint8 or (1, C, H, W) normalised. Raises UsageError."""
    folder = read_folder(Path(path))
    photo, _ = picture(Path(image))
    return inputs_for(
        folder.artifact.inputs[0], Probes.of(folder.preprocessing.resized(photo)[None], folder.preprocessing)
    )


def picture(path: Path) -> tuple[Pixels, Pixels | None]:
    """The pixels as they are stored, (h, w) or (h, w, C) uint8, and as the EXIF orientation shows them where there is
    one. Raises UsageError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            shown = ImageOps.exif_transpose(file)
            stored, turned = (
                np.asarray(each if each.mode in ("L", "RGB", "RGBA") else each.convert("RGB")) for each in (file, shown)
            )
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read as a picture: {error}", hint="name a JPEG or PNG file") from None
    same = stored.shape == turned.shape and np.array_equal(stored, turned)
    return stored, None if same else turned


def _one_image(theirs: npt.NDArray[np.generic], pre: Preprocessing, photo: Pixels) -> npt.NDArray[np.generic]:
    """Without the batch axis. Raises ShapeError, and says which step seems to be missing."""
    array = theirs[0] if theirs.ndim == 4 and len(theirs) == 1 else theirs
    (height, width), channels = pre.size, len(pre.mean)
    good = {(height, width, channels), (channels, height, width), *([(height, width)] if channels == 1 else [])}
    if array.shape in good:
        if array.dtype.kind != "f" and array.dtype != np.uint8:
            raise ShapeError(f"the array holds {array.dtype}", hint="save uint8 pixels, or a float tensor")
        if not np.isfinite(array.astype(np.float64)).all():
            raise ShapeError("the array holds NaN or infinite values", hint="look where your preprocessing divides")
        return array
    uncropped = frames(pre, *photo.shape[:2])[""]
    hint = f"save one image of {height} x {width} pixels, (H, W, {channels}) or ({channels}, H, W), uint8 or float"
    axes = set(array.shape)
    if array.shape[:2] == (width, height) or array.shape[-2:] == (width, height):
        hint = "height and width are exchanged; " + hint
    elif {uncropped.height, uncropped.width} <= axes and (uncropped.height, uncropped.width) != pre.size:
        hint = "it was resized and not cropped; " + hint
    elif set(photo.shape[:2]) <= axes:
        hint = "it was not resized; " + hint
    raise ShapeError(f"the array is {theirs.dtype} {theirs.shape}", hint=hint)


def _ranked(seen: list[Reading], made: list[Candidate]) -> list[Explanation]:
    """Explanations, nearest first: all of them at a grid of pixels, the promising ones at every pixel."""
    height, width, _ = made[0].pixels.shape
    step = max(1, int((height * width / SCREENED) ** 0.5))
    thin = slice(None, None, step)
    screened = [
        (float(np.abs(reading.levels[thin, thin] - candidate.pixels[thin, thin]).mean()), reading, candidate)
        for reading in seen
        for candidate in made
    ]
    factor, slack = NEAR
    best = min(levels for levels, *_ in screened)
    near = [each for each in screened if each[0] <= 1.5 * factor * best + 5 * slack]
    near.sort(key=lambda each: (len(each[1].mistakes) + len(each[2].mistakes), each[0]))
    nearest = sorted(screened, key=lambda each: each[0])[:SHOWN]
    exact: dict[tuple[str, ...], float] = {}
    for _, reading, candidate in (*near[:50], *nearest):
        levels = float(np.abs(reading.levels - candidate.pixels).mean())
        exact.setdefault((*reading.mistakes, *candidate.mistakes), levels)
    return sorted((Explanation(*item) for item in exact.items()), key=lambda each: each.levels)


def _simplest(ranked: Iterable[Explanation]) -> Explanation:
    """The fewest mistakes among those that are as near as the nearest."""
    ranked = list(ranked)
    factor, slack = NEAR
    near = [each for each in ranked if each.levels <= factor * ranked[0].levels + slack]
    return min(near, key=lambda each: (len(each.mistakes), each.levels))


def _effects(folder: Folder, ours: Pixels, theirs: npt.NDArray[np.generic], layout: str) -> tuple[Effect, ...]:
    """The artefact on both; nothing where it takes pixels and the user has a tensor."""
    (spec,) = folder.artifact.inputs
    own = inputs_for(spec, Probes.of(ours[None], folder.preprocessing))
    last = theirs.reshape(*ours.shape) if layout == "HWC" else theirs.transpose(1, 2, 0)
    if theirs.dtype == np.uint8:
        their = inputs_for(spec, Probes.of(np.ascontiguousarray(last, np.uint8)[None], folder.preprocessing))
    elif spec.content == "image":
        return ()
    else:
        their = np.ascontiguousarray(last.transpose(2, 0, 1)[None], spec.dtype)
    target = target_named(folder.target)
    with opened(target, folder.path) as session:
        outputs = run_artifact(session, folder.artifact, np.concatenate([own, their]))
    labels = folder.manifest["labels"]
    return tuple(_effect(folder, name, outputs[name], labels) for name in folder.noise)


def _effect(folder: Folder, name: str, values: Array, labels: list[str] | None) -> Effect:
    golden = np.load(folder.path / "golden" / f"{name}.npy", allow_pickle=False)
    rel = Reference(golden, len(golden), folder.noise[name]).rel(values[1:], values[:1])
    if values.ndim != 2 or values.shape[1] < 2:
        return Effect(name, rel)
    ours, theirs = (labels[index] if labels else str(index) for index in values.argmax(1))
    return Effect(name, rel, ours, theirs)
