"""OpenVINO's CPU plugin as it computes a float32 graph unasked, wherever the CPU has bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.target import Arithmetic, Artifact, Missing, Precision, Witness, WitnessKind
from castling_deploy.witnesses.openvino import OpenVINO, computed

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values

CPU = Path("/proc/cpuinfo")
FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86's two, Arm's


class OpenVINOBfloat16:
    """bfloat16 has 8 significant bits, and float32's range: nothing overflows."""

    name = "openvino-bf16"
    about = "Intel's runtime, which computes in bfloat16 where this CPU has it"
    targets: tuple[str, ...] = ("onnx",)
    images: int | None = None
    precisions: tuple[Precision, ...] = (Precision.FP32,)

    def missing(self) -> Missing | None:
        if CPU.exists() and FLAGS.isdisjoint(CPU.read_text().split()):
            return Missing(
                "this CPU has no bfloat16", "take another machine; --on openvino computes in float32 anywhere"
            )
        return OpenVINO().missing()

    def witness(self) -> Witness:
        return Witness(f"openvino {version('openvino')} (CPU, bfloat16 arithmetic)", WitnessKind.RUNTIME)

    def arithmetic(self, precision: Precision) -> Arithmetic:
        return Arithmetic.BF16

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        return computed("bf16", self.witness(), folder, artifact, inputs, advance)
