"""The golden images of an artefact folder and what the reference says of them, read back and held against the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from castling_deploy.artifact import Folder
from castling_deploy.errors import UsageError
from castling_deploy.parity import TOLERANCES, ParityReport, Reference
from castling_deploy.plain import plain
from castling_deploy.probes import structured
from castling_deploy.selftests.facts import GoldenOutput, golden_document, golden_output

# The golden images are a few of the real ones that a parity.json is about: their spreads are alike, and not equal.
ALIKE = 10.0


@dataclass(frozen=True)
class Golden:
    """`images` (P, H, W, C) uint8, and the reference of every output on them."""

    images: npt.NDArray[np.uint8]
    references: Mapping[str, Reference]


def read_golden(folder: Folder) -> Golden:
    """Raises UsageError where a file cannot be read, or does not have a finite output for every image."""
    golden = folder.path / "golden"
    try:
        images = np.load(golden / "images.npy", allow_pickle=False)
        outputs = {name: np.load(golden / f"{name}.npy", allow_pickle=False) for name in folder.noise}
        for name, values in outputs.items():
            if len(values) != len(images) or not np.isfinite(values).all():
                raise ValueError(f"{name}.npy holds no finite output for every image")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the golden images of '{folder.path}' cannot be read: {str(error).partition('.  If you')[0]}",
            hint="export the artefact again",
        ) from None
    real = min(folder.golden_real, len(images))
    return Golden(images, {name: Reference(values, real, folder.noise[name]) for name, values in outputs.items()})


def judged_by(golden: Golden, folder: Folder) -> tuple[GoldenOutput, ...]:
    """How an error on the golden images is judged, as it follows from the outputs that are expected of them."""
    tolerance = TOLERANCES[folder.precision]
    return tuple(golden_output(reference, name, tolerance) for name, reference in golden.references.items())


def unfounded_golden(golden: Golden, folder: Folder, parity: ParityReport) -> Iterator[str]:
    """Spreads, limits and noise that do not follow from the golden outputs, or that `parity` tells otherwise."""
    flat = structured(folder.preprocessing.size, golden.images.shape[-1])
    is_flat = [any(np.array_equal(image, other) for other in flat) for image in golden.images]
    if is_flat != [index >= folder.golden_real for index in range(len(golden.images))]:
        yield f"the first {folder.golden_real} golden images are not the real ones, and the others the structured ones"
    if folder.manifest["golden"] != plain(golden_document(judged_by(golden, folder), folder.golden_real)):
        yield "the manifest's golden spreads and limits are not those of the golden outputs"
    limits = {tolerance.limit: tolerance for tolerance in TOLERANCES.values()}
    for seen in parity.witnesses:
        tolerance = limits.get(seen.limit or TOLERANCES[folder.precision].limit)
        for output in seen.outputs:
            reference = golden.references.get(output.name)
            if reference is None or tolerance is None:
                continue
            if output.noise_rel != reference.noise_rel(tolerance):
                yield f"the manifest's noise_rel of {output.name} is not that of parity.json"
            if reference.spread and not 1 / ALIKE <= output.spread / reference.spread <= ALIKE:
                yield (
                    f"parity.json's spread of {output.name} is {output.spread:.2e}, and that of the golden outputs "
                    f"{reference.spread:.2e}"
                )
