"""The preprocessing of an artefact, step by step, exact enough to be written again in any language, to the last bit.

`manifest.json` and the folder's README both say what is said here. `tests/test_contract.py` has an implementation from
the manifest alone, without Pillow, and it gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from castling_deploy.preprocessing import Preprocessing
from castling_deploy.target import TensorSpec

FIXED_POINT_BITS = 22  # of Pillow's weights: 32 less the 8 of a pixel, less 2 that a sum of them may need

DECODED = (
    "8 bits per channel, the pixels as they are stored: no EXIF rotation, no colour profile, no gamma (JPEG decoders "
    "differ by a level or two among themselves)"
)
# Half the width of each kernel in pixels of the output, and its weight at a distance of x.
KERNELS: dict[str, tuple[float, str]] = {
    "box": (0.5, "1 for -0.5 < x <= 0.5, else 0"),
    "bilinear": (1.0, "1 - |x| for |x| < 1, else 0"),
    "hamming": (1.0, "sin(pi x) / (pi x) * (0.54 + 0.46 cos(pi x)) for |x| < 1, else 0; 1 at 0"),
    "bicubic": (
        2.0,
        "with a = -0.5: ((a + 2) |x| - (a + 3)) x^2 + 1 for |x| < 1; (((|x| - 5) |x| + 8) |x| - 4) a for |x| < 2; "
        "else 0",
    ),
    "lanczos": (3.0, "sin(pi x) / (pi x) * sin(pi x / 3) / (pi x / 3) for -3 <= x < 3, else 0; 1 at 0"),
}


@dataclass(frozen=True)
class Step:
    """One step: its name, what has to be done, and the numbers it needs."""

    step: str
    rule: str
    values: dict[str, Any] = field(default_factory=dict)


def steps(pre: Preprocessing, spec: TensorSpec) -> tuple[Step, ...]:
    """From an image file to what the input `spec` of the artefact takes."""
    return (*_to_pixels(pre), *_to_tensor(pre, spec))


def _to_pixels(pre: Preprocessing) -> Iterator[Step]:
    height, width = pre.size
    if pre.channel_order == "L":
        yield Step(
            "decode",
            f"{DECODED}; one channel, from colours L = (19595 R + 38470 G + 7471 B + 32768) >> 16 in integers",
            {"channel_order": "L", "dtype": "uint8"},
        )
    else:
        yield Step(
            "decode",
            f"{DECODED}; an alpha channel is dropped, gray is repeated; channels in the order {pre.channel_order}",
            {"channel_order": pre.channel_order, "dtype": "uint8"},
        )
    if pre.keep_ratio:
        yield Step(
            "size",
            f"for a picture of h x w pixels, in float64: scale = max({height} / {pre.crop_fraction} / h, {width} / "
            f"{pre.crop_fraction} / w), each divided from left to right; new height = max({height}, round(h * scale)), "
            f"new width = max({width}, round(w * scale)); round takes a half to the even number",
            {"covers": [height / pre.crop_fraction, width / pre.crop_fraction], "keeps_ratio": True},
        )
    else:
        yield Step(
            "size",
            f"new height {height}, new width {width}, whatever the ratio of the picture",
            {"covers": [height, width], "keeps_ratio": False},
        )
    yield _resize(pre.resize_kernel)
    if pre.keep_ratio:
        yield Step(
            "crop",
            f"{height} rows from floor((new height - {height}) / 2), {width} columns from floor((new width - "
            f"{width}) / 2)",
            {"height": height, "width": width},
        )


def _resize(kernel: str) -> Step:
    values: dict[str, Any] = {"library": "Pillow", "filter": kernel.upper(), "antialias": kernel != "nearest"}
    if kernel == "nearest":
        return Step(
            "resize",
            "Pillow's Image.resize with NEAREST: for n new pixels from m old ones s = m / n in float64, the first is "
            "at s / 2, each next one s after it (added up), rounded down; in rows and in columns",
            values,
        )
    support, weight = KERNELS[kernel]
    half, bits = 2 ** (FIXED_POINT_BITS - 1), FIXED_POINT_BITS
    return Step(
        "resize",
        f"Pillow's Image.resize with {kernel.upper()}, whose kernel widens where the picture shrinks (antialias), in "
        "two calls: every row to the new width, then every column to the new height; an axis whose size stays is left "
        "alone. For new pixel i of n, from old "
        f"pixels 0 .. m-1, in float64: s = m / n, f = max(s, 1), c = (i + 0.5) s, r = {support} f; old pixels j from "
        "max(0, trunc(c - r + 0.5)) to below min(m, trunc(c + r + 0.5)); their weights k((j - c + 0.5) * (1 / f)), "
        f"divided by the sum of these; k(x) = {weight}. Each weight times 2^{bits} is rounded to an integer, a half "
        f"away from zero; the new pixel is ({half} + sum of weight * pixel) >> {bits}, clipped to 0 .. 255: uint8 "
        "after the rows, and after the columns",
        {**values, "support": support, "fixed_point_bits": bits},
    )


def _to_tensor(pre: Preprocessing, spec: TensorSpec) -> Iterator[Step]:
    shape = {"name": spec.name, "shape": spec.shape, "dtype": spec.dtype, "layout": spec.layout}
    if spec.content == "image":
        yield Step("feed", "the pixels as they are: the artefact normalises them itself", shape)
        return
    yield Step(
        "normalise",
        f"(x / 255 - mean) / std, each of the three operations in float32; by channel, mean {list(pre.mean)}, "
        f"std {list(pre.std)}",
        {"range": [0, 255], "divide_by": 255, "mean": pre.mean, "std": pre.std, "dtype": "float32"},
    )
    yield Step("feed", f"axes in the order {spec.layout}: all of channel 0, row by row, then channel 1, ...", shape)
