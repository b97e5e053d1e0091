"""Which modules 8 bits hurt most, and how many of them have to stay in float for the accuracy that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import ExportError
from castling_deploy.int8.calibration import calibrated, calibration_images
from castling_deploy.int8.quantised import quantised
from castling_deploy.ladder import Ladder, Lowered, run
from castling_deploy.parity import QUANTISED, TOLERANCES, Reference, Rung, Verdict, worst
from castling_deploy.request import Int8
from castling_deploy.target import Precision
from castling_deploy.task import Outputs

# Without labels the outputs themselves are looked at: half a point then is an error of a quarter of their spread.
SPREAD_PER_POINT = 0.5
RANKED_ON = 16  # real images


def in_8_bits(
    ladder: Ladder,
    asked: Int8,
    form: Quantisation,
    advance: Callable[[float], None] = lambda share: None,
) -> Ladder:
    """The ladder of an int8 artefact: as many modules in 8 bits as the budget allows, the most sensitive ones in float.

    `form` says what levels are, and holds no module.
    Raises ExportError where not one of them fits the budget, UsageError for images that are none.
    """
    probes = ladder.probes
    images = calibration_images(asked.data, asked.samples, probes.preprocessing, probes.images[: probes.real])
    seen = calibrated(ladder.folded, images, form.activations)
    found = replace(form, ranges=seen.ranges, results=seen.results)
    advance(0.2)
    chosen = lowered(ladder, found, asked.max_drop)
    if chosen.rung.verdict is not Verdict.PASS:
        ranking = ranked(ladder, found, lambda share: advance(0.2 + 0.6 * share))
        best = _least_in_float(ladder, found, ranking, asked.max_drop)
        if best is None:
            raise ExportError(
                f"with any module in 8 bits this network loses more than {asked.max_drop:g} points",
                hint="allow more with --max-drop, give more images with --calib-data, or use --precision fp16",
            )
        chosen = best
    return ladder.with_8_bits(chosen)


def in_saved_8_bits(ladder: Ladder, document: Mapping[str, Any]) -> Ladder:
    """The ladder of an artefact that was made already, by the ranges in its parity.json."""
    ranges, results = (
        {path: (low, high) for path, (low, high) in document[name].items()} for name in ("ranges", "results")
    )
    quantisation = Quantisation(
        ranges,
        Activations(document["activations"]),
        results,
        document.get("palette"),
        document.get("weight_bits", Quantisation.weight_bits),
    )
    kept, ranking = tuple(document["kept_in_float"]), tuple(document["ranking"].items())
    return ladder.with_8_bits(lowered(ladder, quantisation, document["max_drop"], kept, ranking))


def ranked(
    ladder: Ladder, quantisation: Quantisation, advance: Callable[[float], None] = lambda share: None
) -> tuple[tuple[str, float], ...]:
    """Every module with the error that it makes alone (its root mean square over the spread), the largest first."""
    few = ladder.probes.few(RANKED_ON)
    rows = ladder.probes.rows(few)[: few.real]
    found: dict[str, float] = {}
    for number, path in enumerate(quantisation.ranges, 1):
        network = quantised(ladder.folded, quantisation.of((path,)))
        found[path] = _error(network, few.tensors[: few.real], ladder.references, rows)
        advance(number / len(quantisation.ranges))
    return tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _error(
    network: nn.Module, tensors: npt.NDArray[np.float32], references: Mapping[str, Reference], rows: Sequence[int]
) -> float:
    outputs = run(network, list(references), tensors)
    return max(
        float(np.sqrt(np.square(outputs[name] - reference.outputs[rows]).mean()) / (reference.spread or 1.0))
        for name, reference in references.items()
    )


def _least_in_float(
    ladder: Ladder, quantisation: Quantisation, ranking: tuple[tuple[str, float], ...], max_drop: float
) -> Lowered | None:
    """The fewest of the worst modules in float that keep the budget, by bisection; None where none but all would."""
    low, high, best = 1, len(ranking) - 1, None
    while low <= high:
        count = (low + high) // 2
        kept = tuple(path for path, _ in ranking[:count])
        tried = lowered(ladder, quantisation.of(quantisation.ranges.keys() - set(kept)), max_drop, kept, ranking)
        if tried.rung.verdict is Verdict.PASS:
            best, high = tried, count - 1
        else:
            low = count + 1
    return best


def lowered(
    ladder: Ladder,
    quantisation: Quantisation,
    max_drop: float,
    kept: tuple[str, ...] = (),
    ranking: tuple[tuple[str, float], ...] = (),
) -> Lowered:
    """What the network computes in these 8 bits, and whether it costs more than `max_drop` points."""
    network, names = quantised(ladder.folded, quantisation), list(ladder.references)
    outputs = run(network, names, ladder.probes.tensors)
    rel = _rel(ladder, outputs)
    before, after = ladder.reference_score, ladder.score(outputs)
    labelled = before is not None and after is not None
    if before is not None and after is not None:
        drop = before - after
    else:
        drop = float("inf") if rel is None else rel / SPREAD_PER_POINT
    rung = Rung(QUANTISED, rel, None, Verdict.PASS if drop <= max_drop else Verdict.FAIL)
    rows = ladder.probes.rows(ladder.few)
    exact = run(network.double(), names, ladder.few.tensors.astype(np.float64))
    coarser = 1.0  # arithmetic than that of this machine
    if quantisation.activations is Activations.FLOAT16:
        coarser = TOLERANCES[Precision.FP16].epsilon / TOLERANCES[Precision.FP32].epsilon
    references = {
        name: replace(
            reference,
            outputs=outputs[name],
            noise=coarser * (reference.rel(outputs[name][rows], exact[name]) or 0.0),
        )
        for name, reference in ladder.references.items()
    }
    return Lowered(quantisation, references, rung, kept, ranking, drop, max_drop, labelled)


def _rel(ladder: Ladder, outputs: Outputs) -> float | None:
    """Of the real images: what lies far outside them is clipped on purpose."""
    return worst(
        reference.rel(outputs[name][: reference.real], reference.outputs[: reference.real])
        for name, reference in ladder.references.items()
    )
