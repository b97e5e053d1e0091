"""Core ML's program in the harshest float16 that a device may compute it in."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.target import Artifact, Missing, Precision, Witness, WitnessKind

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values

IMAGES = 64  # 0.06 s for one of the bundled classifiers', 0.12 s for one of the detector's


class MilHalf:
    """The evaluator with float16 sums, one term after another: the sum is rounded after every term.

    No program says how an accelerator adds up, and nobody outside knows of Apple's. Strictly sequential is the most
    that rounding can do to a sum, and the most that can leave float16 on the way; sums in blocks or in float32, which
    the target's own witness has, lie between the two. It is the sums of matmul, linear, conv, the reductions, softmax
    and the norms; conv_transpose, einsum and pools add in float32 here too. An operation that the program declares as
    float32 stays as it is, so a float32 program has nothing that is added up otherwise.
    """

    name = "mil-fp16"
    about = "the evaluator with every sum rounded to float16"
    targets: tuple[str, ...] = ("coreml",)
    images: int | None = IMAGES
    precisions: tuple[Precision, ...] = (Precision.FP16,)

    def missing(self) -> Missing | None:
        if find_spec("coremltools") is None:  # its description of the file format
            return Missing("coremltools is not installed", "pip install 'castling-deploy[coreml]'")
        return None

    def witness(self) -> Witness:
        return Witness(
            f"castling-deploy {version('castling-deploy')} MIL evaluator (float16 sums)", WitnessKind.REFERENCE
        )

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact
        from castling_deploy.export.coreml_session import EvaluatedSession
        from castling_deploy.export.mil_evaluator import load_program
        from castling_deploy.export.to_coreml import FILE

        program = load_program(folder / FILE, accumulate="float16")
        return run_artifact(EvaluatedSession(program, self.witness()), artifact, inputs, advance)
