"""The manifest tells the preprocessing to the last bit: somebody who has nothing else gets the same bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from castling_deploy import bundled
from castling_deploy.contract import steps
from castling_deploy.plain import plain
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.reading.card import KERNELS
from castling_deploy.target import TensorSpec

Pixels = npt.NDArray[np.uint8]
TENSOR = TensorSpec("image", (1, 3, 32, 48), "float32", "NCHW")
SIZES = [(160, 160), (37, 90), (91, 31), (20, 20), (32, 48), (33, 160)]


def told(pre: Preprocessing, spec: TensorSpec = TENSOR) -> dict[str, dict[str, Any]]:
    """What a reader of the manifest has."""
    return {step["step"]: step for step in json.loads(json.dumps(plain(steps(pre, spec))))}


def kernel(name: str, x: float) -> float:
    distance = abs(x)
    if name == "BOX":
        return float(-0.5 < x <= 0.5)
    if name == "BILINEAR":
        return max(0.0, 1 - distance)
    if name == "HAMMING":
        if distance == 0:
            return 1.0
        turn = math.pi * distance
        return math.sin(turn) / turn * (0.54 + 0.46 * math.cos(turn)) if distance < 1 else 0.0
    if name == "BICUBIC":
        a = -0.5
        if distance < 1:
            return ((a + 2) * distance - (a + 3)) * distance * distance + 1
        return (((distance - 5) * distance + 8) * distance - 4) * a if distance < 2 else 0.0
    assert name == "LANCZOS"

    def sinc(value: float) -> float:
        return math.sin(math.pi * value) / (math.pi * value) if value else 1.0

    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


def along_rows(image: Pixels, new: int, step: dict[str, Any]) -> Pixels:
    """(h, w, C) -> (h, new, C), as the rule of the step "resize" says."""
    old, values = image.shape[1], step["values"]
    s = old / new
    if values["filter"] == "NEAREST":
        places, at = [], s / 2
        for _ in range(new):
            places.append(int(at))
            at += s
        return image[:, places]
    if new == old:
        return image
    f, bits = max(s, 1.0), values["fixed_point_bits"]
    result = np.zeros((image.shape[0], new, image.shape[2]), np.uint8)
    for i in range(new):
        c, r = (i + 0.5) * s, values["support"] * f
        chosen = range(max(0, int(c - r + 0.5)), min(old, int(c + r + 0.5)))
        weights = [kernel(values["filter"], (j - c + 0.5) * (1 / f)) for j in chosen]
        total = sum(weights)
        whole = [int(math.copysign(0.5, weight) + weight / total * 2**bits) for weight in weights]
        sums = 2 ** (bits - 1) + sum(image[:, j].astype(np.int64) * each for j, each in zip(chosen, whole))
        result[:, i] = np.clip(sums >> bits, 0, 255)
    return result


def strangers(image: Pixels, manifest: dict[str, dict[str, Any]], size: tuple[int, int]) -> Pixels:
    """An image file's pixels (h, w, 3) at the network's size, by the manifest alone."""
    h, w, _ = image.shape
    if manifest["decode"]["values"]["channel_order"] == "L":
        red, green, blue = np.moveaxis(image.astype(np.int64), -1, 0)
        image = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[..., None]
    new_height, new_width = size
    if manifest["size"]["values"]["keeps_ratio"]:
        covers = manifest["size"]["values"]["covers"]
        scale = max(covers[0] / h, covers[1] / w)
        new_height, new_width = max(size[0], round(h * scale)), max(size[1], round(w * scale))
    wide = along_rows(image, new_width, manifest["resize"])
    done = along_rows(wide.transpose(1, 0, 2), new_height, manifest["resize"]).transpose(1, 0, 2)
    top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
    return done[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("keep_ratio", [True, False], ids=["cropped", "stretched"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_stranger_gets_the_same_pixels(name: str, keep_ratio: bool) -> None:
    pre = Preprocessing((32, 48), resize_kernel=name, crop_fraction=0.9, keep_ratio=keep_ratio)
    for index, (height, width) in enumerate(SIZES):
        photo = bundled.photographs()[index, :height, :width]
        np.testing.assert_array_equal(strangers(photo, told(pre), pre.size), pre.resized(photo))


def test_a_stranger_gets_the_same_gray() -> None:
    pre = Preprocessing((32, 48), mean=(0.5,), std=(0.25,), channel_order="L")
    photo = bundled.photographs()[3]
    np.testing.assert_array_equal(strangers(photo, told(pre), pre.size), pre.resized(photo))


def test_a_stranger_gets_the_same_tensor() -> None:
    pre = Preprocessing((32, 48))
    values = told(pre)["normalise"]["values"]
    pixels = np.stack([pre.resized(photo) for photo in bundled.photographs()])
    mean, std = (np.array(values[name], np.float32) for name in ("mean", "std"))
    tensor = (pixels.astype(np.float32) / np.float32(values["divide_by"]) - mean) / std
    np.testing.assert_array_equal(np.moveaxis(tensor, 3, 1), pre.normalised(pixels))
    assert pre.normalised(pixels).dtype == values["dtype"]


def test_an_artefact_that_takes_pixels_asks_for_no_normalisation() -> None:
    manifest = told(Preprocessing((32, 48)), TensorSpec("image", (1, 32, 48, 3), "uint8", "NHWC", "image"))
    assert list(manifest) == ["decode", "size", "resize", "crop", "feed"]
    assert manifest["feed"]["values"]["dtype"] == "uint8"
    assert "crop" not in told(Preprocessing((32, 48), keep_ratio=False))
