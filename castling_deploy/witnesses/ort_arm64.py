"""ONNX Runtime's own arm64 build under emulation: Arm's kernels, float16 arithmetic included, without an Arm machine.

On x86, ONNX Runtime computes float16 in float32, and other int8 sums than on Arm; this is where Arm's are seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.target import Artifact, Missing, Witness
from castling_deploy.witnesses import arm64_build, arm64_sysroot
from castling_deploy.witnesses.arm64_sysroot import IMAGES

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values

SCRIPT = Path(__file__).with_name("ort_guest.py")


class OrtArm64:
    """`model.onnx` by ONNX Runtime for aarch64."""

    name = "arm64"
    about = "the runtime's own build for Arm, emulated"
    targets: tuple[str, ...] = ("onnx",)
    images: int | None = IMAGES

    def missing(self) -> Missing | None:
        return arm64_sysroot.missing("onnxruntime")

    def witness(self) -> Witness:
        return arm64_sysroot.witness("ONNX Runtime", "onnxruntime")

    def set_up(self, advance: Advance) -> None:
        arm64_build.set_up(advance)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact
        from castling_deploy.witnesses.guest import guest

        here = arm64_sysroot.require("onnxruntime")
        (model,) = artifact.files
        with guest(here.python(SCRIPT, str(folder / model)), self.witness()) as session:
            return run_artifact(session, artifact, inputs, advance)
