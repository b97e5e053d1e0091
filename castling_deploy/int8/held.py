"""Whether the files of an int8 artefact hold the weights that the network in 8 bits has.

The outputs do not tell: their limit is 3e-2 of the spread, and one small Linear with its scales along the wrong axis
came to 2.9e-2. So what is stored is compared itself, and may differ by the rounding of its scales alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from castling_deploy.eight_bits import WEIGHT_LEVELS
from castling_deploy.errors import ExportError
from castling_deploy.int8.quantised import quantised_module
from castling_deploy.target import Network, Target


def require_held(target: Target, folder: Path, network: Network) -> None:
    """Raises ExportError where something is `misheld`."""
    if wrong := misheld(target, folder, network):
        raise ExportError("; ".join(wrong[:3]), hint="report this network")


def misheld(target: Target, folder: Path, network: Network) -> tuple[str, ...]:
    """What is wrong about the weights in 8 bits of the artefact in `folder`.

    Every weight of the network's quantisation has to be in the files; and whatever is stored in levels or tables there,
    biases too, has to be the network's. Of weights and biases in float nothing is said: converters fold them.
    """
    levels = network.quantisation
    if levels is None:
        return ()
    try:
        wrong, held = [], list(enumerate(target.dequantised(folder)))
    except ExportError as error:
        return (error.message,)
    known = set[int]()
    for path in levels.ranges:
        own = quantised_module(network.module, levels, path)
        found = {place for place, values in held if same(values, own.weight.numpy())}
        if not found:
            wrong.append(f"the file does not hold {path}.weight as the network in 8 bits has it")
        if own.bias is not None:
            found |= {place for place, values in held if same(values, own.bias.detach().numpy())}
        known |= found
    strays = [values.shape for place, values in held if place not in known]
    return *wrong, *(f"numbers of shape {shape} in the file's 8 bits are none of the network's" for shape in strays)


def same(values: npt.NDArray[np.floating[Any]], expected: npt.NDArray[np.float32]) -> bool:
    """Whether `values`, levels times scales of their dtype, are `expected`, which has float32 scales.

    A scale and its product with a level are rounded: twice half an epsilon, and half the smallest number where a scale
    is below the dtype's normal range. The first channel tells most that are different. A Linear may be stored as a
    kernel of 1 x 1.
    """
    if values.shape == (*expected.shape, 1, 1):
        values = values[..., 0, 0]
    if values.shape != expected.shape:
        return False
    dtype = np.finfo(values.dtype)
    least = np.float32(WEIGHT_LEVELS * float(dtype.smallest_subnormal))
    for rows in (slice(1), slice(1, None)):
        allowed = np.abs(expected[rows]) * np.float32(dtype.eps) + least
        if not (np.abs(values[rows] - expected[rows]) <= allowed).all():
            return False
    return True
