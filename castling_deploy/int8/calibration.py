"""The range of what every Linear is given, from one pass over calibration images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from castling_deploy.eight_bits import FEW_ROWS, Activations, scale_of
from castling_deploy.errors import UsageError
from castling_deploy.int8.quantised import rounded
from castling_deploy.preprocessing import Preprocessing

SAMPLES = 64  # images by default
KEPT = 4096  # values of every image and module that a clipping is judged by
SHARES = tuple(np.linspace(1.0, 0.3, 15).tolist())  # of an end of the range that are tried
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

Range = tuple[float, float]


def calibration_images(
    data: Path | None, samples: int | None, preprocessing: Preprocessing, bundled: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Normalised images (n, C, H, W): of the folder or .npz file `data`, or without one of `bundled` (n, H, W, C).

    An .npz file holds uint8 pictures (n, H, W[, C]) in its first array. Raises UsageError for what holds no image.
    """
    count = samples or SAMPLES
    if data is None:
        return preprocessing.normalised(bundled[_spread(len(bundled), count)])
    pictures = _of_folder(data, count) if data.is_dir() else _of_archive(data, count)
    return preprocessing.normalised(np.stack([preprocessing.resized(picture) for picture in pictures]))


def _spread(total: int, count: int) -> npt.NDArray[np.intp]:
    """`count` of `total` places, or all of them, spread evenly."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.intp)


def _of_folder(folder: Path, count: int) -> list[npt.NDArray[np.uint8]]:
    from PIL import Image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise UsageError(f"there is no image in '{folder}'", hint=f"--calib-data takes {', '.join(IMAGES)} files")
    pictures = []
    for path in (files[index] for index in _spread(len(files), count)):
        try:
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise UsageError(f"'{path}' is no image: {error}", hint="remove it from --calib-data") from None
    return pictures


def _of_archive(path: Path, count: int) -> npt.NDArray[np.uint8]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive[archive.files[0]]
    except (OSError, EOFError, ValueError, IndexError, AttributeError, BadZipFile) as error:
        raise UsageError(
            f"'{path}' holds no images: {error}", hint="--calib-data takes a folder of images, or an .npz file"
        ) from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise UsageError(
            f"'{path}' holds {images.dtype} of shape {images.shape}", hint="store uint8 pictures (n, H, W, C)"
        )
    return images[_spread(len(images), count)]


@torch.no_grad()
def ranges(network: nn.Module, tensors: npt.NDArray[np.float32], activations: Activations) -> Mapping[str, Range]:
    """(lo, hi) of the input of every Linear of `network` that sees FEW_ROWS tokens or more, by its path; of weights
    alone every Linear.

    Outliers are clipped where that makes the mean square of all rounding errors smaller, unless every token has its own
    range; zero is always inside. A Linear that sees fewer, like a head, stays in float: it costs nothing, and it
    decides.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    ends: dict[str, Range] = {}

    def watch(path: str, x: torch.Tensor) -> None:
        if activations is not Activations.FLOAT and (x.ndim < 3 or x.shape[-2] < FEW_ROWS):
            return
        low, high = ends.get(path, (0.0, 0.0))
        ends[path] = (min(low, x.min().item()), max(high, x.max().item()))
        flat = x.flatten()
        seen.setdefault(path, []).append(flat[:: max(1, len(flat) // KEPT)])

    hooks = [
        module.register_forward_pre_hook(lambda _, given, path=path: watch(path, given[0]))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        for image in torch.from_numpy(tensors):
            network(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    if not activations.calibrated:
        return ends
    return {path: clipped(torch.cat(values), ends[path], activations) for path, values in seen.items()}


def clipped(values: torch.Tensor, ends: Range, activations: Activations) -> Range:
    """The part of the range `ends` that loses least on `values`: first its upper end is moved, then its lower one."""
    best = ends
    for end in (1, 0):
        candidates = [(best[0], ends[1] * share) if end else (ends[0] * share, best[1]) for share in SHARES]
        best = min(candidates, key=lambda candidate: _loss(values, candidate, activations))
    return best


def _loss(values: torch.Tensor, ends: Range, activations: Activations) -> float:
    return (rounded(values, *scale_of(ends, activations)) - values).square().mean().item()
