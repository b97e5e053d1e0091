"""What 8 bits stand for: levels of weights and of activations. Imports neither torch nor numpy by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Linears on fewer rows (tokens) are left as they are, in float and with the batch's axis: there is nothing to gain, and
# OpenVINO 2026.4.1 crashes (SIGSEGV) on Linear, HardSwish, Linear and a residual on 4, 6 and 8 rows without that axis.
FEW_ROWS = 16
WEIGHT_LEVELS = 127  # of an 8-bit weight, to either side of zero: -128 would make it lopsided


class Activations(StrEnum):
    """What the 8 bits of an activation stand for; the values are the names in parity.json.

    One range per tensor, found by calibration: with a zero point, or around zero. Or one per token and image, with a
    zero point, found while the artefact runs. Or nothing: weights alone are in 8 bits, and float16 is computed in.
    """

    UINT8 = "uint8"
    INT8 = "int8"
    PER_TOKEN = "int8 per token"
    FLOAT = "float16"

    @property
    def calibrated(self) -> bool:
        """Whether ranges are part of the artefact."""
        return self in (Activations.UINT8, Activations.INT8)


@dataclass(frozen=True)
class Quantisation:
    """Which Linears compute in 8 bits, by their paths, and the range (lo, hi) of what each of them is given.

    Weights are int8 with one scale per output channel. Everything else stays in float.
    """

    ranges: Mapping[str, tuple[float, float]]
    activations: Activations

    def scale(self, path: str) -> tuple[float, int, int, int]:
        """Scale, zero point, lowest and highest level of what the Linear `path` is given."""
        return scale_of(self.ranges[path], self.activations)


def scale_of(ends: tuple[float, float], activations: Activations) -> tuple[float, int, int, int]:
    """Scale, zero point, lowest and highest level of calibrated 8-bit activations in the range `ends`, which holds
    zero. The scale is a float32 number.
    """
    import numpy as np

    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if activations is Activations.INT8:
        return float(np.float32(max(-low, high, 1e-30) / 127)), 0, -128, 127
    scale = float(np.float32(max(high - low, 1e-30) / 255))
    return scale, round(-low / scale), 0, 255


def weight_levels(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(C_out, C_in) -> whole numbers from -127 to 127, and the scale of every output channel (C_out,)."""
    import numpy as np

    scales = (np.abs(weight).max(1) / np.float32(WEIGHT_LEVELS)).astype(np.float32)
    scales[scales == 0] = 1
    levels = np.clip(np.round(weight / scales[:, None]), -WEIGHT_LEVELS, WEIGHT_LEVELS)
    return levels.astype(np.int8), scales
