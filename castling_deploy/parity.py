"""Parity: does an artefact compute what the reference computes, and could this comparison have told if it did not?

An error is measured against what the output has to say: `rel = max|artefact - reference| / spread`, the spread being
how far the reference's outputs for different real images lie apart. (An input whose output lies farther from those of
the real images than they from each other is measured by its own distance: inputs far out of range say more.) Two
untrained networks agree on every top-1 and within 1e-3 for different images, so a comparison states its power, and one
without power is `inconclusive`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from castling_deploy.target import Arithmetic, Precision, Witness, WitnessKind

Array = npt.NDArray[np.floating]

MIN_POWER = 0.95  # share of image pairs that the gate has to tell apart
DISTANCE_IMAGES = 64  # whose pairwise distances are taken: 2,016 pairs
CAST, FOLD = "cast", "fold"  # the first rungs
QUANTISED = "quantised"  # the rung of what 8 bits cost
LOWERED = "lowered"  # the rung of the graph that a converter is handed
EXPORTED = "exported"  # the rung that the witnesses stand on
COMPILED = "compiled"  # the rung of the devices among them, where others stand on the one before
CLEARLY_WRONG = 8.0  # times the rounding noise: such an error is no rounding, however badly conditioned the network


class Verdict(StrEnum):
    """What a comparison says."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @staticmethod
    def worst(verdicts: Sequence[Verdict]) -> Verdict:
        """FAIL before INCONCLUSIVE before PASS; nothing compared is not a pass."""
        for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
            if verdict in verdicts:
                return verdict
        return Verdict.PASS if verdicts else Verdict.INCONCLUSIVE


@dataclass(frozen=True)
class Tolerance:
    """`limit` on rel, for arithmetic that rounds to one part in 1 / `epsilon`."""

    limit: float
    epsilon: float


TOLERANCES: Mapping[Precision | Arithmetic, Tolerance] = {
    Precision.FP32: Tolerance(1e-4, float(np.finfo(np.float32).eps)),
    Precision.FP16: Tolerance(2e-2, float(np.finfo(np.float16).eps)),
    # Against the quantised network in PyTorch: a value between two levels may fall to either side, and does so again
    # in the layers behind it. Few values do: the bundled networks differ by 2e-3 to 2e-2, like float16. How many do is
    # measured on that network, in float32 and in float64, so that its noise is what it is.
    Precision.INT8: Tolerance(3e-2, float(np.finfo(np.float32).eps)),
    # With sums in float32 the bundled networks are off by 3e-3 to 2.2e-2; one wrong weight of a classifier is 6e-2.
    Arithmetic.BF16: Tolerance(4e-2, 2.0**-7),
}
# Folding is exact in real arithmetic. In float64 a deep network repeats itself to about 1e-14 of the spread.
FOLD_TOLERANCE = Tolerance(1e-9, float(np.finfo(np.float64).eps))
# A lowered graph is exact but for its constants (1/C, 2**-0.5), which are float32: 3e-8 on the bundled segmenter. The
# limit is a tenth of what float32 arithmetic may do.
LOWERED_TOLERANCE = Tolerance(1e-5, float(np.finfo(np.float32).eps))


@dataclass(frozen=True)
class Reference:
    """The outputs to compare with, (P, ...) float32, the first `real` of them for real images.

    `noise` is the rel of the reference itself in float32 against float64: what its own rounding does to the output.
    `unit` is the error that counts as 1 where that is not the spread: pixels, classes.
    """

    outputs: Array
    real: int
    noise: float
    unit: float | None = None

    @cached_property
    def spread(self) -> float:
        """Median over pairs of real images of the largest difference between their outputs; or `unit`."""
        if self.unit is not None:
            return self.unit
        return float(np.median(self._distances)) if self._distances.size else 0.0

    def rel(self, actual: Array, expected: Array) -> float | None:
        """max|actual - expected| over outputs (n, ...) of these images or others, against what each output has to say:
        the spread, or its median distance to the real images' outputs where that is larger. None without a spread."""
        if self.spread == 0 or not len(expected):
            return None
        rels = []
        for one, other in zip(actual, expected, strict=True):
            said = other.astype(np.float64).ravel()
            apart = 0.0 if self.unit is not None else np.median([distance(said, image) for image in self._real])
            rels.append(distance(one.astype(np.float64).ravel(), said) / max(self.spread, apart))
        return float(max(rels))

    def noise_rel(self, tolerance: Tolerance) -> float:
        """The rel that arithmetic of this precision is expected to make."""
        return self.noise * tolerance.epsilon / float(np.finfo(np.float32).eps)

    def power(self, tolerance: Tolerance) -> float:
        """Share of the pairs of real images that the gate tells apart: were one output another's, it would fail."""
        if self.spread == 0:
            return 0.0
        blind = (tolerance.limit + self.noise_rel(tolerance)) * self.spread
        return float((self._distances > blind).mean())

    def widest_limit(self, tolerance: Tolerance) -> float:
        """The limit on rel below which the power is MIN_POWER and more; 0 where it is less with every limit."""
        if self.spread == 0 or not self._distances.size:
            return 0.0
        ordered, pairs = np.sort(self._distances), self._distances.size
        last = max(index for index in range(pairs) if (pairs - index) / pairs >= MIN_POWER)
        return max(0.0, float(ordered[last]) / self.spread - self.noise_rel(tolerance))

    @cached_property
    def _real(self) -> Array:
        real = self.outputs[: min(self.real, DISTANCE_IMAGES)]
        return real.reshape(len(real), int(np.prod(real.shape[1:])))

    @cached_property
    def _distances(self) -> Array:
        pairs = ((one, other) for index, one in enumerate(self._real) for other in self._real[index + 1 :])
        return np.array([distance(one.astype(np.float64), other) for one, other in pairs])


@dataclass(frozen=True)
class OutputParity:
    """The numbers of one output. None where a number has no meaning (no top-1 without classes).

    `spread` and `noise_rel` are those of the reference, `power` that of this comparison. With a limit on rel below
    `widest_limit` it would have power enough; None where the limit is in the output's own unit (pixels, classes).
    """

    name: str
    spread: float
    noise_rel: float
    power: float
    max_abs: float | None
    rel: float | None
    cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None
    verdict: Verdict
    widest_limit: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why a witness has no numbers: it crashed, raised an error, or went over its limits of time or memory."""

    how: str
    message: str

    @property
    def verdict(self) -> Verdict:
        """What does not run there is a failure; what was not waited for is open."""
        return Verdict.INCONCLUSIVE if self.how in ("timeout", "memory") else Verdict.FAIL


@dataclass(frozen=True)
class WitnessReport:
    """What one witness computed, output by output, and the task's score of it where labels are known.

    `limit` is the one on rel that its arithmetic was judged by, `images` how many it ran on. One of kind BUILDER ran
    nothing: that it took the artefact is all it says.
    """

    witness: Witness
    outputs: tuple[OutputParity, ...]
    score: float | None
    limit: float | None = None
    images: int | None = None
    failure: Failure | None = None

    @property
    def verdict(self) -> Verdict:
        if self.failure is not None:
            return self.failure.verdict
        if self.witness.kind is WitnessKind.BUILDER:
            return Verdict.PASS
        return Verdict.worst([output.verdict for output in self.outputs])


@dataclass(frozen=True)
class Rung:
    """One step of the ladder from the checkpoint to the artefact, against the rung it is judged by.

    `limit` is None where no number decides (the cast is an approximation: its evidence is in the report).
    """

    name: str
    rel: float | None
    limit: float | None
    verdict: Verdict

    @property
    def decisive(self) -> bool:
        """A rung without a limit (the cast) decides only where it failed its task."""
        return self.limit is not None or self.verdict is Verdict.FAIL


@dataclass(frozen=True)
class ParityReport:
    """Every rung and every witness."""

    precision: Precision
    probes: int
    rungs: tuple[Rung, ...]
    witnesses: tuple[WitnessReport, ...]

    @property
    def power(self) -> float:
        """That of the weakest comparison."""
        return min((output.power for report in self.witnesses for output in report.outputs), default=0.0)

    @property
    def verdict(self) -> Verdict:
        decisive = [rung.verdict for rung in self.rungs if rung.decisive]
        return Verdict.worst(
            [*decisive, *(report.verdict for report in self.witnesses)]
            if self.witnesses
            else [*decisive, Verdict.INCONCLUSIVE]
        )


def witness_rungs(precision: Precision, witnesses: Sequence[WitnessReport]) -> tuple[Rung, ...]:
    """The last rungs, where the witnesses stand that computed in this precision.

    A device runs what it compiled itself: beside others, it has a rung of its own.
    """
    tolerance = TOLERANCES[precision]
    same = [seen for seen in witnesses if seen.limit in (None, tolerance.limit)]
    devices = [seen for seen in same if seen.witness.kind is WitnessKind.DEVICE]
    others = [seen for seen in same if seen not in devices] or devices
    rungs = [_witness_rung(EXPORTED, others, tolerance)]
    if devices and others != devices:
        rungs.append(_witness_rung(COMPILED, devices, tolerance))
    return tuple(rungs)


def _witness_rung(name: str, witnesses: Sequence[WitnessReport], tolerance: Tolerance) -> Rung:
    """The gravest of what these found."""
    outputs = [output for seen in witnesses for output in seen.outputs]
    comparable = all(output.max_abs is not None for output in outputs)  # no NaN, and the right shape
    rel = worst(output.rel for output in outputs) if comparable else None
    return Rung(name, rel, tolerance.limit, Verdict.worst([seen.verdict for seen in witnesses]))


def compare(
    name: str,
    actual: Array,
    reference: Reference,
    tolerance: Tolerance,
    power: float,
    widest_limit: float | None = None,
) -> OutputParity:
    """`actual` (P, ...) against the reference. A NaN never passes; a shape that differs never passes.

    `power` and `widest_limit` are those of the whole comparison: an output that follows from another (probabilities
    from logits) may tell fewer images apart without harm.
    """
    expected, actual = reference.outputs, np.asarray(actual)
    noise = reference.noise_rel(tolerance)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        unknown = (None,) * 5
        return OutputParity(name, reference.spread, noise, power, *unknown, Verdict.FAIL, widest_limit)
    rel = reference.rel(actual, expected)
    largest, noise_power, signal_power, own_power, product = 0.0, 0.0, 0.0, 0.0, 0.0
    for one, other in zip(actual, expected):  # image by image: a segmenter's outputs fill the memory otherwise
        said, wanted = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
        error = said - wanted
        largest = max(largest, float(np.abs(error).max(initial=0)))
        noise_power += float(error @ error)
        signal_power += float(wanted @ wanted)
        own_power += float(said @ said)
        product += float(said @ wanted)
    lengths = (own_power * signal_power) ** 0.5
    return OutputParity(
        name,
        reference.spread,
        noise,
        power,
        largest,
        rel,
        cosine=product / lengths if lengths else None,
        sqnr_db=float(10 * np.log10(signal_power / noise_power)) if noise_power and signal_power else None,
        top1_agreement=(
            top1_agreement(actual, expected, tolerance.limit * reference.spread) if reference.unit is None else None
        ),
        verdict=judged(rel, tolerance.limit, noise, telling=power >= MIN_POWER),
        widest_limit=widest_limit,
    )


def distance(one: Array, other: Array) -> float:
    """The largest difference between two outputs of the same shape, one of them float64."""
    return float(np.abs(one - other).max(initial=0))


def worst(rels: Iterable[float | None]) -> float | None:
    """The largest rel that is known; None where none is."""
    return max((rel for rel in rels if rel is not None), default=None)


def judged(rel: float | None, limit: float, noise_rel: float, *, telling: bool) -> Verdict:
    """The verdict on an error; `telling`, whether this comparison has the power to tell a wrong output."""
    if rel is None:
        return Verdict.INCONCLUSIVE
    if rel > max(limit, CLEARLY_WRONG * noise_rel):
        return Verdict.FAIL
    if rel > limit or not telling:
        return Verdict.INCONCLUSIVE
    return Verdict.PASS


def top1_agreement(actual: Array, expected: Array, bound: float) -> float | None:
    """Share of rows (P, classes) with the same top-1. A flip counts only where the margin of the reference, between
    its first class and its second, exceeds twice the error bound: closer ones are ties within the tolerance."""
    if expected.ndim != 2 or expected.shape[1] < 2 or not len(expected):
        return None
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 2 * bound
    flipped = (actual.argmax(1) != expected.argmax(1)) & clear
    return float(1 - flipped.mean())
