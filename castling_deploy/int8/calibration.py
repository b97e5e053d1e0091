"""The range of what every Linear and convolution is given, from one pass over calibration images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from castling_deploy.eight_bits import FEW_PRODUCTS, FEW_ROWS, Activations, Quantisation, scale_of
from castling_deploy.errors import UsageError
from castling_deploy.int8.quantised import rounded
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.rewrite import copied

SAMPLES = 64  # images by default
KEPT = 4096  # values of every image and module that a clipping is judged by, beside the ends of its channels
MARGIN = 2.0  # how much wider than what was seen a range of 16 bits is, which can afford it: nothing is clipped
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
def calibrated(network: nn.Module, tensors: npt.NDArray[np.float32], activations: Activations) -> Quantisation:
    """Every Linear of `network` that 8 bits pay for, and every convolution in front of the first Linear, with the range
    (lo, hi) of what it is given.

    In 8 bits, outliers are clipped where that makes the mean square of the errors behind the weights smaller, unless
    every token has its own range; zero is always inside. Convolutions behind tokens, in necks and heads, return levels
    that hang on the order of their sums: with all 26 of a detector in 8 bits, float32 and float64 differ by 5 % of its
    outputs' spread, and no artefact can be verified (0.1 % with the three of its stem).
    """
    network = copied(network)  # others may run or pickle the one that was given, and would meet the hooks
    given, results = _Seen(activations), _Seen(activations)
    products = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    reach = {path: module.weight.square().transpose(0, 1).flatten(1).sum(1) for path, module in products.items()}
    called: list[str] = []

    def watch(path: str, x: torch.Tensor, y: torch.Tensor) -> None:
        called.append(path)
        module = products[path]
        if isinstance(module, nn.Linear) and linear_pays(y, activations):
            given.add(path, x, reach[path])
            if activations.returned:
                results.add(path, y, torch.ones(y.shape[-1]))
        elif isinstance(module, nn.Conv2d) and activations.convolves and conv_pays(module, y):
            given.add(path, x.movedim(1, -1), reach[path])
            results.add(path, y.movedim(1, -1), torch.ones(y.shape[1]))

    hooks = [
        module.register_forward_hook(lambda _, x, y, path=path: watch(path, x[0], y))
        for path, module in products.items()
    ]
    try:
        for image in torch.from_numpy(tensors):
            network(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    in_stem = set(takewhile(lambda path: isinstance(products[path], nn.Conv2d), called))
    found = Quantisation(given.ranges(), activations, results.ranges())
    return found.of([path for path in found.ranges if path in in_stem or isinstance(products[path], nn.Linear)])


def linear_pays(result: torch.Tensor, activations: Activations) -> bool:
    """Whether a Linear is in 8 bits. One that sees few tokens, like a head, gains nothing, and it decides.

    Weights alone gain by their size.
    """
    return activations.as_they_are or (result.ndim > 2 and result.shape[-2] >= FEW_ROWS)


def conv_pays(conv: nn.Conv2d, result: torch.Tensor) -> bool:
    """Whether a convolution is faster in 8 bits."""
    positions = result.shape[-2] * result.shape[-1]
    return conv.groups == 1 and conv.weight[0].numel() >= FEW_PRODUCTS and positions >= FEW_ROWS


class _Seen:
    """The values of one tensor of every module that a clipping is judged by, and both ends of all of them.

    Kept of an image are values at even distances and, for every channel, the largest and the smallest. The latter are
    few and may decide: in the bundled DeiT, 0.1 % of what one Linear is given is larger than 2, all of it in a few
    channels. Clipped there, the outputs were off by 8.6 % of their spread (root mean square), and are by 0.1 % now.
    """

    def __init__(self, activations: Activations) -> None:
        self.activations = activations
        self.ends: dict[str, Range] = {}
        self.values: dict[str, list[torch.Tensor]] = {}
        self.costs: dict[str, torch.Tensor] = {}  # of an error in each value that is kept of one image

    def add(self, path: str, x: torch.Tensor, channel_costs: torch.Tensor) -> None:
        """One image's `x` (..., C); an error in a channel costs its square times that channel's of `channel_costs`."""
        low, high = self.ends.get(path, (0.0, 0.0))
        self.ends[path] = (min(low, x.min().item()), max(high, x.max().item()))
        rows = x.flatten(0, -2)
        step = max(1, rows.numel() // KEPT)
        while math.gcd(step, rows.shape[1]) > 1:  # else some channels were never met
            step += 1
        kept = rows.flatten()[::step]
        if path not in self.costs:
            met = channel_costs[torch.arange(0, rows.numel(), step) % rows.shape[1]]
            self.costs[path] = torch.cat([step * met, channel_costs, channel_costs])
        self.values.setdefault(path, []).append(torch.cat([kept, rows.amax(0), rows.amin(0)]))

    def ranges(self) -> Mapping[str, Range]:
        if not self.activations.calibrated:
            return self.ends
        if self.activations is Activations.UINT16:
            return {path: (MARGIN * low, MARGIN * high) for path, (low, high) in self.ends.items()}
        return {
            path: clipped(torch.stack(self.values[path]), self.costs[path], ends, self.activations)
            for path, ends in self.ends.items()
        }


def clipped(values: torch.Tensor, costs: torch.Tensor, ends: Range, activations: Activations) -> Range:
    """The part of the range `ends` that loses least on `values` (images, n), an error of which costs its square times
    `costs` (n,): first the upper end is moved, then the lower one."""

    def loss(candidate: Range) -> float:
        return ((rounded(values, *scale_of(candidate, activations)) - values).square() @ costs).mean().item()

    best = ends
    for end in (1, 0):
        candidates = [(best[0], ends[1] * share) if end else (ends[0] * share, best[1]) for share in SHARES]
        best = min(candidates, key=loss)
    return best
