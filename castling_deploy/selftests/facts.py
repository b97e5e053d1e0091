"""What a self-test has to know of its artefact; it is written into the program, so that none needs a JSON reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from castling_deploy.parity import CLEARLY_WRONG, Reference, Tolerance, distance
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.target import Artifact


@dataclass(frozen=True)
class GoldenOutput:
    """An output of the network and what its golden file says.

    `spreads` (golden images,) is what an error on each image is divided by: the median distance between the golden
    outputs, or that of this image's output from them where it is larger, as in `parity.Reference.rel`. `limit` is the
    largest rel that `castling verify` does not call wrong. Without a spread (0) nothing can be judged.
    """

    name: str
    file: str
    spreads: tuple[float, ...]
    limit: float


@dataclass(frozen=True)
class Facts:
    """`batch` is what the artefact was built for, -1 for any. `outputs` are all of it, in its own order; `golden` the
    network's own. `dtype` is that of the normalised input."""

    model: str
    input: str
    content: Literal["tensor", "image"]
    dtype: str
    batch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    outputs: tuple[str, ...]
    golden: tuple[GoldenOutput, ...]


def golden_output(reference: Reference, name: str, tolerance: Tolerance) -> GoldenOutput:
    """`reference` holds the golden images' outputs alone, as in `castling verify`."""
    rows = reference.outputs.astype(np.float64).reshape(len(reference.outputs), -1)
    real = rows[: reference.real]
    spreads = [
        max(reference.spread, float(np.median([distance(row, other) for other in real]))) if reference.spread else 0.0
        for row in rows
    ]
    limit = max(tolerance.limit, CLEARLY_WRONG * reference.noise_rel(tolerance))
    return GoldenOutput(name, f"{name}.npy", tuple(spreads), limit)


def facts_of(artifact: Artifact, preprocessing: Preprocessing, golden: tuple[GoldenOutput, ...]) -> Facts:
    """The first file of an artefact is the one that a self-test opens."""
    (given,) = artifact.inputs
    return Facts(
        artifact.files[0],
        given.name,
        given.content,
        given.dtype,
        given.shape[0],
        preprocessing.mean,
        preprocessing.std,
        tuple(output.name for output in artifact.outputs),
        golden,
    )


def golden_document(golden: tuple[GoldenOutput, ...], real: int) -> dict[str, Any]:
    """For the manifest: which files hold what, and how an error is judged. The first `real` images are real ones."""
    return {
        "images": "golden/images.npy",
        "real": real,
        "rule": "rel of an output = the largest |artefact - golden| of an image / its spread, the worst of all images",
        "outputs": [
            {"name": each.name, "file": f"golden/{each.file}", "spreads": each.spreads, "limit": each.limit}
            for each in golden
        ],
    }
