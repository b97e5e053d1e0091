"""OpenVINO's CPU plugin, on an ONNX artefact."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.errors import ExportError
from castling_deploy.export.to_onnx import FILE
from castling_deploy.quiet import toolchain
from castling_deploy.target import Artifact, Missing, Witness, WitnessKind

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values
    from castling_deploy.target import Arrays


class OpenVINO:
    """Every artefact is computed in float32, on one thread, whatever the CPU could do besides.

    Unasked, OpenVINO 2026.4 computes a float32 graph in bfloat16 wherever the CPU has it; asked for float16 on a CPU
    that has none, it takes bfloat16 too. In float32, a float16 graph keeps its rounded weights, and its intermediate
    values are not rounded.
    """

    name = "openvino"
    about = "Intel's runtime on this CPU"
    targets: tuple[str, ...] = ("onnx",)
    images: int | None = None

    def missing(self) -> Missing | None:
        if find_spec("openvino") is None:
            return Missing("openvino is not installed", "pip install 'castling-deploy[openvino]'")
        return None

    def witness(self) -> Witness:
        return Witness(f"openvino {version('openvino')} (CPU, float32 arithmetic)", WitnessKind.RUNTIME)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        return computed("f32", self.witness(), folder, artifact, inputs, advance)


def computed(
    arithmetic: str, witness: Witness, folder: Path, artifact: Artifact, inputs: Values, advance: Advance
) -> Mapping[str, Values]:
    """As `Runner.run`, in `arithmetic` ("f32", "bf16"). Raises ExportError."""
    from castling_deploy.execution import run_artifact

    with toolchain("OpenVINO does not run the artefact"):
        names = [output.name for output in artifact.outputs]
        return run_artifact(_CompiledSession(folder / FILE, names, witness, arithmetic), artifact, inputs, advance)


class _CompiledSession:
    """`model`, compiled to compute in `arithmetic` ("f32", "bf16").

    `names` are the outputs that it is said to have: OpenVINO gives one output several names.
    """

    def __init__(self, model: Path, names: list[str], witness: Witness, arithmetic: str) -> None:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": arithmetic, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": "1"}
        self._model = openvino.Core().compile_model(model, "CPU", options)
        taken = self._model.get_property("INFERENCE_PRECISION_HINT")
        if taken != getattr(openvino.Type, arithmetic):
            raise ExportError(
                f"OpenVINO computes in {taken} where {arithmetic} was asked for",
                hint="take the word of another runner: castling doctor lists them",
            )
        self._names = {
            port: next((name for name in names if name in port.names), port.any_name) for port in self._model.outputs
        }
        self.witness = witness

    def __call__(self, inputs: Arrays) -> Arrays:
        values = self._model(dict(inputs))
        return {name: values[port] for port, name in self._names.items()}
