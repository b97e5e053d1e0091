"""TensorRT-RTX's parser and builder, which need no GPU, on the typed graph of a TensorRT artefact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.export import to_tensorrt
from castling_deploy.export.to_onnx import FILE
from castling_deploy.target import Artifact, Missing, Witness, WitnessKind

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values

MODULE = "tensorrt_rtx"


class RtxBuilder:
    """The engine is built and thrown away: the artefact's own may be of another builder, or not be there at all."""

    name = "rtx"
    about = "NVIDIA's builder: it makes an engine and runs nothing"
    targets: tuple[str, ...] = ("tensorrt",)
    images: int | None = 0

    def missing(self) -> Missing | None:
        reason = to_tensorrt.obstacle(MODULE)
        return None if reason is None else Missing(reason, "pip install 'castling-deploy[tensorrt-rtx]'")

    def witness(self) -> Witness:
        return Witness(f"{MODULE} {version(MODULE)}", WitnessKind.BUILDER)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        with tempfile.TemporaryDirectory() as scratch:
            built = to_tensorrt.built_engine(MODULE, folder / FILE, Path(scratch, to_tensorrt.ENGINE))
        to_tensorrt.require_products(built, artifact.details["products"])
        advance(1.0)
        return {}
