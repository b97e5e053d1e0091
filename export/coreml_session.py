"""A saved .mlpackage ready to run: by Core ML itself on macOS, by the evaluator elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.export.mil_evaluator import Program
from castling_deploy.export.mil_package import read_package
from castling_deploy.target import Witness

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from castling_deploy.target import Arrays


class EvaluatedSession:
    """The package, run by the evaluator."""

    def __init__(self, program: Program, witness: Witness) -> None:
        self.program, self.witness = program, witness

    def __call__(self, inputs: Arrays) -> Arrays:
        return arrays(self.program(inputs), self.program.package.classes)


class PredictSession:
    """The package, run by Core ML through coremltools on all compute units. macOS only."""

    def __init__(self, path: Path, witness: Witness) -> None:
        import coremltools

        package = read_package(path)
        self.witness, self.classes = witness, package.classes
        self.images = {feature.name for feature in package.inputs if feature.kind == "image"}
        self.model = coremltools.models.MLModel(str(path))

    def __call__(self, inputs: Arrays) -> Arrays:
        from PIL import Image

        fed = {
            name: Image.fromarray(array[0].squeeze()) if name in self.images else array  # (H, W, 3), or (H, W)
            for name, array in inputs.items()
        }
        return arrays(self.model.predict(fed), self.classes)


def arrays(outputs: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, npt.NDArray[np.generic]]:
    """Core ML's outputs as arrays: a classifier's dictionary becomes (1, classes), its label is left out."""
    import numpy as np

    return {
        name: np.array([[value[label] for label in classes]], np.float32) if isinstance(value, dict) else value
        for name, value in outputs.items()
        if not isinstance(value, str)
    }
