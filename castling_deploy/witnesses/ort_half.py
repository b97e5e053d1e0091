"""ONNX Runtime made to round to float16 wherever the graph says so, which on x86 it does not by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.export import onnx_stored, to_onnx
from castling_deploy.target import Artifact, Missing, Precision, Witness

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values


class OrtHalf:
    """No float16 export is verified without it: overflows that a GPU or a phone would see are seen here alone."""

    name = "ort-fp16"
    about = "ONNX Runtime, made to round where float16 is stored"
    targets: tuple[str, ...] = ("onnx", "tensorrt")
    images: int | None = None
    precisions: tuple[Precision, ...] = (Precision.FP16,)  # a float32 graph never says so
    required: tuple[Precision, ...] = (Precision.FP16,)

    def missing(self) -> Missing | None:
        return None

    def witness(self) -> Witness:
        return onnx_stored.witness()

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact

        return run_artifact(onnx_stored.StoredSession(folder / to_onnx.FILE, self.witness()), artifact, inputs, advance)
