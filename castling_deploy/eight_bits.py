"""What 8 bits stand for: levels of weights and of activations. Imports neither torch nor numpy by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from castling_deploy.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Linears on fewer rows (tokens) are left as they are, in float and with the batch's axis: there is nothing to gain, and
# OpenVINO 2026.4.1 crashes (SIGSEGV) on Linear, HardSwish, Linear and a residual on 4, 6 and 8 rows without that axis.
FEW_ROWS = 16
# Convolutions with fewer products behind a value stay in float. In 8 bits, ONNX Runtime 1.32 takes 0.35 (576 products)
# to 0.79 (32) of float32's time for one, and 3.2 times as long for a stem's first (27); one thread, VNNI.
FEW_PRODUCTS = 32
BIAS_LEVELS = 2**30  # to either side of zero, so that as much is left of the int32 that sums are in
# Inputs that share a scale in 4 bits: the fewest that XNNPACK takes. With one scale for a channel, the outputs of the
# bundled networks are off by 4.4 to 12.9 % of their spread (root mean square), and by 0.6 to 1.8 % so.
GROUP = 32
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the scale that holds a group's largest weight: the best is taken
WEIGHT_BITS = (4, 8)
WEIGHT_LEVELS = 127  # of an 8-bit weight, to either side of zero: -128 would make it lopsided


class Activations(StrEnum):
    """What the 8 bits of an activation stand for; the values are the names in parity.json.

    One range per tensor, found by calibration: with a zero point, or around zero. Or one per token and image, with a
    zero point, found while the artefact runs. Or nothing: weights alone are in levels, and float16 or float32 is
    computed in. uint16 has 16 bits, beside 8 of a weight.
    """

    UINT8 = "uint8"
    UINT16 = "uint16"
    INT8 = "int8"
    PER_TOKEN = "int8 per token"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def calibrated(self) -> bool:
        """Whether ranges are part of the artefact."""
        return self in (Activations.UINT8, Activations.UINT16, Activations.INT8)

    @property
    def as_they_are(self) -> bool:
        """Whether weights alone are in levels."""
        return self in (Activations.FLOAT16, Activations.FLOAT32)

    @property
    def convolves(self) -> bool:
        """Whether convolutions are in 8 bits too."""
        return self in (Activations.UINT8, Activations.UINT16)

    @property
    def returned(self) -> bool:
        """Whether a Linear returns levels too, and not floats: Qualcomm's HTP has no other product of levels."""
        return self is Activations.UINT16

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest of a calibrated range."""
        return {Activations.INT8: (-128, 127), Activations.UINT16: (0, 2**16 - 1)}.get(self, (0, 255))


@dataclass(frozen=True)
class Quantisation:
    """Which Linears and convolutions compute in 8 bits, by their paths, and the range (lo, hi) of what each is given.

    Weights are int8 with one scale per output channel. Those of Linears alone may be otherwise: in a look-up table by
    an index of `palette` bits; or in 4 `weight_bits` with a scale for every GROUP of a row, where a row can be cut so.
    A Linear returns floats, unless it has a range in `results`; a convolution always has one, since ONNX Runtime has
    no other. Everything else stays in float.
    """

    ranges: Mapping[str, tuple[float, float]]
    activations: Activations
    results: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    palette: int | None = None
    weight_bits: int = 8

    def scale(self, path: str) -> tuple[float, int, int, int]:
        """Scale, zero point, lowest and highest level of what the module `path` is given."""
        return scale_of(self.ranges[path], self.activations)

    def result_scale(self, path: str) -> tuple[float, int, int, int]:
        """Those of what the module `path` returns."""
        return scale_of(self.results[path], self.activations)

    def levels_of(
        self,
        weight: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None = None,
        given_scale: float | None = None,
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """`weight_groups` of a weight (C_out, C_in) that is in 4 bits, and `weight_levels` of another: the scales of
        the former have two axes.
        """
        if self.weight_bits == 4 and weight.shape[1] % GROUP == 0:
            return weight_groups(weight)
        return weight_levels(weight, bias, given_scale)

    def of(self, paths: Collection[str]) -> Quantisation:
        """These modules alone."""
        return replace(
            self,
            ranges={path: ends for path, ends in self.ranges.items() if path in paths},
            results={path: ends for path, ends in self.results.items() if path in paths},
        )


def scale_of(ends: tuple[float, float], activations: Activations) -> tuple[float, int, int, int]:
    """Scale, zero point, lowest and highest level of calibrated activations in the range `ends`, which holds zero. The
    scale is a float32 number.
    """
    import numpy as np

    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    lowest, highest = activations.levels
    if activations is Activations.INT8:
        return float(np.float32(max(-low, high, 1e-30) / highest)), 0, lowest, highest
    scale = float(np.float32(max(high - low, 1e-30) / highest))
    return scale, round(-low / scale), lowest, highest


def weight_levels(
    weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None = None, given_scale: float | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(C_out, C_in) -> whole numbers from -127 to 127, and the scale of every output channel (C_out,).

    A `bias` (C_out,) is stored in steps of this scale times that of what the module is given: where a BatchNorm's
    weight has gone to nothing and its bias has not, the scale is as large as that takes.
    """
    import numpy as np

    scales = (np.abs(weight).max(1) / np.float32(WEIGHT_LEVELS)).astype(np.float32)
    if bias is not None and given_scale is not None:
        scales = np.maximum(scales, (np.abs(bias) / (BIAS_LEVELS * given_scale)).astype(np.float32))
    scales[scales == 0] = 1
    levels = np.clip(np.round(weight / scales[:, None]), -WEIGHT_LEVELS, WEIGHT_LEVELS)
    return levels.astype(np.int8), scales


def require_weight_bits(bits: int) -> None:
    """Raises UsageError for what no weight is stored in."""
    if bits not in WEIGHT_BITS:
        raise UsageError(f"no weights of {bits} bits", hint=f"--weight-bits takes {' or '.join(map(str, WEIGHT_BITS))}")


def weight_groups(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(C_out, C_in) -> whole numbers from -8 to 7, and the scale of every group of inputs (C_out, C_in / GROUP).

    Scales are bfloat16 numbers, as XNNPACK stores them.
    """
    import numpy as np

    groups = weight.reshape(len(weight), -1, GROUP)
    largest = np.maximum(np.abs(groups).max(2), np.finfo(np.float32).tiny) / 7
    levels, scales, loss = groups, largest, np.full_like(largest, np.inf)
    for share in SHARES:
        tried = ((largest * np.float32(share)).view(np.uint32) & 0xFFFF0000).view(np.float32)
        steps = np.clip(np.round(groups / tried[..., None]), -8, 7)
        lost = np.square(steps * tried[..., None] - groups).sum(2)
        better = lost < loss
        levels, scales = np.where(better[..., None], steps, levels), np.where(better, tried, scales)
        loss = np.minimum(lost, loss)
    return levels.reshape(weight.shape).astype(np.int8), scales
