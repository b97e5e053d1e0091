"""Running an artefact on the probes, whatever the batch and the kind of input it was built for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from castling_deploy.errors import ExportError
from castling_deploy.parity import Array
from castling_deploy.probes import Probes
from castling_deploy.target import Artifact, Session, TensorSpec

Scalar = TypeVar("Scalar", bound=np.generic)

# For a dynamic batch: sizes that differ, so that one that only works at the traced size is seen.
DYNAMIC_CHUNKS = (1, 3, 32)


def inputs_for(spec: TensorSpec, probes: Probes) -> npt.NDArray[np.generic]:
    """All probes as this input wants them: (P, H, W, C) uint8, or (P + extremes, C, H, W) normalised."""
    return probes.images if spec.content == "image" else probes.tensors.astype(spec.dtype, copy=False)


def repeated(inputs: npt.NDArray[Scalar], count: int) -> npt.NDArray[Scalar]:
    """The first `count` inputs, over and over where there are fewer."""
    return np.ascontiguousarray(np.resize(inputs, (count, *inputs.shape[1:])))


def run_artifact(
    session: Session,
    artifact: Artifact,
    inputs: npt.NDArray[np.generic],
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Array]:
    """Every output of the artefact on `inputs` (P, ...), by name, P first. Raises ExportError on undeclared outputs."""
    (spec,) = artifact.inputs
    names = {output.name: output.dtype for output in artifact.outputs}
    collected: dict[str, list[Array]] = {name: [] for name in names}
    done = turn = 0
    while done < len(inputs):
        size = spec.shape[0] if spec.shape[0] > 0 else DYNAMIC_CHUNKS[min(turn, len(DYNAMIC_CHUNKS) - 1)]
        chunk = inputs[done : done + size]
        padded = chunk
        if spec.shape[0] > 0 and len(chunk) < size:  # a fixed batch: fill up with the last input
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
        outputs = session({spec.name: np.ascontiguousarray(padded)})
        if set(outputs) != set(names):
            raise ExportError(
                f"the artefact returned outputs {sorted(outputs)}, its manifest promises {sorted(names)}",
                hint="the artefact was changed after its export; export it again",
            )
        for name, dtype in names.items():
            collected[name].append(np.asarray(outputs[name], dtype)[: len(chunk)])
        done, turn = done + len(chunk), turn + 1
        advance(done / len(inputs))
    return {name: np.concatenate(parts) for name, parts in collected.items()}
