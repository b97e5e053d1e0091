"""What people do to a picture where something else is right: the known mistakes of preprocessing, each carried out.

A mistake is about pixels (which of them, mixed by which kernel, in which order of channels) or about values (how a
tensor was made of pixels, and how its axes lie). The first kind is done to the photo; the second is undone on the
user's array. Everything is compared in levels, 0..255 (H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from castling_deploy.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from castling_deploy.reading.card import KERNELS
from castling_deploy.target import TensorSpec

Pixels = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.float32]
Resize = Callable[[Pixels, int, int], Pixels]  # (h, w, C) to a new height and width

FRACTIONS = (1.0, 0.875, 0.9, 0.95)  # of crops: what timm's networks use
GRAY = 114  # what YOLO pads with
SCALES: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
    "Inception's (0.5, 0.5)": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "MNIST's": ((0.1307,), (0.3081,)),
    "0.5 and 0.5": ((0.5,), (0.5,)),
}


@dataclass(frozen=True)
class Frame:
    """A photo resized to `height` x `width`, then cut from (`top`, `left`); what lies outside is `fill`."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    fill: int = 0


@dataclass(frozen=True)
class Candidate:
    """The network's pixels of a photo, made with these mistakes: (H, W, C) uint8."""

    mistakes: tuple[str, ...]
    pixels: Pixels


@dataclass(frozen=True)
class Reading:
    """A user's array as levels (H, W, C), if these mistakes were made; `layout` says how its axes were taken."""

    mistakes: tuple[str, ...]
    layout: str
    levels: Levels


def candidates(photo: Pixels, pre: Preprocessing, rotated: Pixels | None = None) -> Iterator[Candidate]:
    """At most one mistake of each kind and two in all, the right pixels first. `photo` is (h, w) or (h, w, C).

    `rotated` is the photo as its EXIF orientation shows it, where it has one.
    """
    resizes = resizers(pre)
    photos = {"": photo} if rotated is None else {"": photo, "the EXIF rotation was applied": rotated}
    for turn, seen in photos.items():
        picture = _in_channels(seen, len(pre.mean))
        done: dict[tuple[str, int, int], Pixels] = {}
        for place, frame in frames(pre, *picture.shape[:2]).items():
            for mix, resize in resizes.items():
                mistakes = tuple(filter(None, (turn, place, mix)))
                if len(mistakes) > 2:
                    continue
                key = mix, frame.height, frame.width
                if key not in done:
                    done[key] = resize(picture, frame.height, frame.width)
                pixels = _cut(done[key], frame, pre.size)
                yield Candidate(mistakes, pixels)
                if pixels.shape[-1] == 3 and len(mistakes) < 2:
                    yield Candidate((*mistakes, "the channels are in the order BGR"), pixels[..., ::-1])


def frames(pre: Preprocessing, h: int, w: int) -> dict[str, Frame]:
    """Where the network's pixels are taken from in a photo of h x w; the right place first, under no name."""
    height, width = pre.size
    right = _covering(pre, h, w) if pre.keep_ratio else Frame(height, width)
    found = {"": right}
    if pre.keep_ratio:
        found["stretched instead of cropped"] = Frame(height, width)
        for fraction in FRACTIONS:
            if fraction != pre.crop_fraction:
                name = f"the crop is {fraction} of the resized picture instead of {pre.crop_fraction}"
                found[name] = _covering(replace(pre, crop_fraction=fraction), h, w)
        for name, rounded in (("down", math.floor), ("up", math.ceil)):
            found[f"the resized picture's size is rounded {name}"] = _covering(pre, h, w, rounded)
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                top, left = right.top + down, right.left + across
                if 0 <= top <= right.height - height and 0 <= left <= right.width - width:
                    found[f"the crop is moved by {down} rows and {across} columns"] = replace(right, top=top, left=left)
    else:
        found["cropped instead of stretched"] = _covering(replace(pre, crop_fraction=1.0), h, w)
    scale = min(height / h, width / w)
    inner = max(1, round(h * scale)), max(1, round(w * scale))
    for name, fill in (("black", 0), ("gray", GRAY)):
        corner = -((height - inner[0]) // 2), -((width - inner[1]) // 2)
        found[f"letterboxed on {name} instead of {'cropped' if pre.keep_ratio else 'stretched'}"] = Frame(
            *inner, *corner, fill
        )
    names: dict[Frame, str] = {}
    for name, frame in found.items():
        names.setdefault(frame, name)
    return {name: frame for frame, name in names.items()}


def resizers(pre: Preprocessing) -> dict[str, Resize]:
    """The ways to resize; the right one first, under no name."""
    found: dict[str, Resize] = {"": _pillow(pre.resize_kernel)}
    for kernel in KERNELS:
        if kernel != pre.resize_kernel:
            found[f"{kernel} instead of {pre.resize_kernel}"] = _pillow(kernel)
    instead = f"instead of {pre.resize_kernel} with it"
    found[f"bilinear without antialias {instead}"] = _without_antialias("bilinear")
    found[f"bicubic without antialias {instead}"] = _without_antialias("bicubic")
    found["bilinear with aligned corners, without antialias"] = _without_antialias("bilinear", align_corners=True)
    found["nearest, counted from the corner of a pixel"] = _from_corners
    return found


def readings(theirs: npt.NDArray[np.generic], pre: Preprocessing, spec: TensorSpec) -> Iterator[Reading]:
    """What an array without its batch axis may be: at most one mistake of layout and one of values.

    The most usual first. Nothing where its shape is neither (H, W, C) nor (C, H, W).
    """
    height, width = pre.size
    channels = len(pre.mean)
    if theirs.shape == (height, width) and channels == 1:
        theirs = theirs[..., None]
    last, first = theirs.shape == (height, width, channels), theirs.shape == (channels, height, width)
    tensor, pixels = spec.content == "tensor", theirs.dtype == np.uint8  # a tensor's pixels may lie either way
    layouts: list[tuple[tuple[str, ...], str, npt.NDArray[np.generic]]] = []
    if last:
        wrong = ("the axes are (H, W, C) where (C, H, W) is right",) if tensor and not pixels else ()
        layouts.append((wrong, "HWC", theirs))
    if first:
        wrong = () if tensor else ("the axes are (C, H, W) where (H, W, C) is right",)
        layouts.append((wrong, "CHW", theirs.transpose(1, 2, 0)))
        reshaped = "the shape is (C, H, W), the values lie as (H, W, C): reshaped, not transposed"
        layouts.append(((reshaped,), "CHW", theirs.reshape(height, width, channels)))
    for axes, layout, values in layouts:
        for wrong_values, levels in _as_levels(values.astype(np.float32), theirs.dtype, pre, spec):
            mistakes = tuple(filter(None, (*axes, wrong_values)))
            yield Reading(mistakes, layout, np.asarray(levels, np.float32))


def _as_levels(
    x: Levels, dtype: np.dtype[np.generic], pre: Preprocessing, spec: TensorSpec
) -> Iterator[tuple[str, Levels]]:
    """The mistake, and the levels (H, W, C) that were there before it."""
    mean, std = np.array(pre.mean, np.float32), np.array(pre.std, np.float32)
    if dtype == np.uint8:
        yield "", x
        return
    if spec.content == "image":
        yield "", x
        yield "divided by 255, which the artefact does itself", x * 255
        yield "normalised, which the artefact does itself", (x * std + mean) * 255
        return
    yield "", (x * std + mean) * 255
    yield "not divided by 255", x * std + mean
    yield "divided by 255 twice", (x * std + mean) * 255 * 255
    yield "divided by 255, mean and std left out", x * 255
    yield "not normalised at all: 0..255", x
    yield "std left out", (x + mean) * 255
    yield "mean left out", x * std * 255
    yield "multiplied by std instead of divided", (x / std + mean) * 255
    if pre.mean != pre.mean[::-1] or pre.std != pre.std[::-1]:
        yield "mean and std in the order BGR", (x * std[::-1] + mean[::-1]) * 255
    for name, (other_mean, other_std) in SCALES.items():
        if len(other_mean) == len(pre.mean) and (other_mean, other_std) != (pre.mean, pre.std):
            yield f"{name} mean and std", (x * np.array(other_std, np.float32) + np.array(other_mean, np.float32)) * 255


def _covering(pre: Preprocessing, h: int, w: int, rounded: Callable[[float], int] = round) -> Frame:
    """The frame of `Preprocessing.resized`, its centre cropped."""
    height, width = pre.size
    scale = max(height / pre.crop_fraction / h, width / pre.crop_fraction / w)
    new_height, new_width = max(height, rounded(h * scale)), max(width, rounded(w * scale))
    return Frame(new_height, new_width, (new_height - height) // 2, (new_width - width) // 2)


def _cut(picture: Pixels, frame: Frame, size: tuple[int, int]) -> Pixels:
    height, width = size
    if frame.top >= 0 and frame.left >= 0 and (frame.height, frame.width) >= size:
        return picture[frame.top : frame.top + height, frame.left : frame.left + width]
    canvas = np.full((height, width, picture.shape[-1]), frame.fill, np.uint8)
    canvas[-frame.top : -frame.top + frame.height, -frame.left : -frame.left + frame.width] = picture
    return canvas


def _in_channels(photo: Pixels, channels: int) -> Pixels:
    """(h, w) or (h, w, C) -> (h, w, channels), as `Preprocessing.resized` begins."""
    from PIL import Image

    picture = np.asarray(Image.fromarray(photo).convert("L" if channels == 1 else "RGB"))
    return picture.reshape(*photo.shape[:2], channels)


def _pillow(kernel: str) -> Resize:
    from PIL import Image

    def resize(picture: Pixels, height: int, width: int) -> Pixels:
        channels = picture.shape[-1]
        given = Image.fromarray(picture if channels == 3 else picture[..., 0])
        scaled = Preprocessing((height, width), resize_kernel=kernel).scaled(given, height, width)
        return np.asarray(scaled).reshape(height, width, channels)

    return resize


def _without_antialias(mode: str, *, align_corners: bool = False) -> Resize:
    """What OpenCV and torch do by default: the kernel stays as wide as it is when a picture shrinks."""

    def resize(picture: Pixels, height: int, width: int) -> Pixels:
        import torch

        given = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32))
        scaled = torch.nn.functional.interpolate(given, (height, width), mode=mode, align_corners=align_corners)
        return scaled[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()

    return resize


def _from_corners(picture: Pixels, height: int, width: int) -> Pixels:
    """What OpenCV's INTER_NEAREST does."""
    h, w, _ = picture.shape
    return picture[np.arange(height) * h // height][:, np.arange(width) * w // width]
