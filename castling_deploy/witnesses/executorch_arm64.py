"""ExecuTorch's own arm64 libraries under emulation: XNNPACK's kernels for Arm, without a phone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.target import Artifact, Missing, Witness
from castling_deploy.witnesses import arm64_build, arm64_sysroot
from castling_deploy.witnesses.arm64_sysroot import IMAGES

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values


class ExecuTorchArm64:
    """`model.pte` by ExecuTorch for aarch64, through the runner that the set-up compiled."""

    name = "arm64"
    about = "the runtime's own build for Arm, emulated"
    targets: tuple[str, ...] = ("executorch",)
    images: int | None = IMAGES

    def missing(self) -> Missing | None:
        return arm64_sysroot.missing("executorch")

    def witness(self) -> Witness:
        return arm64_sysroot.witness("ExecuTorch", "executorch")

    def set_up(self, advance: Advance) -> None:
        arm64_build.set_up(advance)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact
        from castling_deploy.witnesses.guest import guest

        here = arm64_sysroot.require("executorch")
        (model,) = artifact.files
        with guest(here.executorch(str(folder / model)), self.witness()) as session:
            return run_artifact(session, artifact, inputs, advance)
