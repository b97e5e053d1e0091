"""What can be asked of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass, field

from castling_deploy.eight_bits import Activations, Quantisation, require_weight_bits
from castling_deploy.errors import UsageError
from castling_deploy.suggest import did_you_mean

OPSETS = range(20, 26)  # what torch 2.13 writes directly; ONNX Runtime 1.32 and TensorRT-RTX 1.7.1 read them all
LATER_LEVELS = 21  # the first opset that has levels of 16 and of 4 bits, and scales for groups
ACTIVATIONS = (Activations.UINT8, Activations.UINT16, Activations.FLOAT32)


def require_opset(opset: int) -> None:
    """Raises UsageError for an opset that the networks are not written in."""
    if opset not in OPSETS:
        reason = (
            "GELU is one operator from opset 20 on; before, torch writes five, which ONNX Runtime does not fuse"
            if opset < OPSETS.start
            else "torch writes no newer one directly"
        )
        raise UsageError(
            f"opset {opset} cannot be exported: {reason}", hint=f"use --opset {OPSETS.start} to {OPSETS.stop - 1}"
        )


@dataclass(frozen=True)
class OnnxOptions:
    """`opset` of the standard operators (None: the first that will do); `dynamic` leaves the batch open; `nms` adds
    boxes to a detector's outputs. In int8, `activations` are uint8, which CPUs are fast with, uint16, which Qualcomm's
    NPU takes, or float32: weights alone are in 8 bits, or in 4 (`weight_bits`), for the smallest file. `tokens_at_once`
    is the most that is computed together of what a large image has (None: all), see onnx_parts.py.

    Raises UsageError for a bad opset, for other levels, and for less than a token.
    """

    opset: int | None = None
    dynamic: bool = field(default=False, metadata={"whole": "network"})
    nms: bool = field(default=False, metadata={"task": "detection"})
    activations: str | None = None  # uint8; with 4 bits, float32
    weight_bits: int = Quantisation.weight_bits
    tokens_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.activations not in (None, *ACTIVATIONS):
            raise UsageError(
                f"activations of int8 cannot be '{self.activations}'", hint=did_you_mean(self.activations, ACTIVATIONS)
            )
        require_weight_bits(self.weight_bits)
        if self.weight_bits == 4 and self.form.activations is not Activations.FLOAT32:
            raise UsageError(
                f"weights of 4 bits are not for {self.activations}", hint="leave out --activations, or --weight-bits"
            )
        if self.tokens_at_once is not None and self.tokens_at_once < 1:
            raise UsageError(f"{self.tokens_at_once} tokens at once", hint="use 1 or more: 256 stay in a core's cache")
        require_opset(self.written_opset)
        if self.written_opset < self._oldest:
            raise UsageError(f"opset {self.opset} has no such levels", hint=f"leave out --opset, or use {self._oldest}")

    @property
    def form(self) -> Quantisation:
        usual = Activations.FLOAT32 if self.weight_bits == 4 else Activations.UINT8
        return Quantisation({}, Activations(self.activations or usual), weight_bits=self.weight_bits)

    @property
    def written_opset(self) -> int:
        return self._oldest if self.opset is None else self.opset

    @property
    def _oldest(self) -> int:
        later = self.form.activations is Activations.UINT16 or self.weight_bits == 4
        return LATER_LEVELS if later else OPSETS.start
