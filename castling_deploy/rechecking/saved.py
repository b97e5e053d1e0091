"""Reading back what `documents` wrote beside an artefact: its parity and its latency. Nothing is executed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from castling_deploy.errors import UsageError
from castling_deploy.parity import (
    CAST,
    COMPILED,
    EXPORTED,
    FOLD,
    FOLD_TOLERANCE,
    LOWERED,
    LOWERED_TOLERANCE,
    MIN_POWER,
    QUANTISED,
    TOLERANCES,
    Failure,
    OutputParity,
    ParityReport,
    Rung,
    Verdict,
    WitnessReport,
    judged,
    witness_rungs,
)
from castling_deploy.target import Precision, Witness, WitnessKind

PARITY = "parity.json"
LATENCY = "latency.json"


@dataclass(frozen=True)
class SavedParity:
    """A parity.json: the report, the score it tells of the artefact (percent, None where unknown), and the JSON itself.

    `metric` names the score.
    """

    report: ParityReport
    metric: str
    score: float | None
    document: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        """What is written as the verdict, or what follows from the rungs and witnesses where that is worse."""
        return Verdict.worst([Verdict(self.document["verdict"]), self.report.verdict])


@dataclass(frozen=True)
class SavedLatency:
    """A latency.json, without its raw times: seconds, and the circumstances under which they can be compared."""

    median_s: float
    p95_s: float
    threads: int
    batch: int
    host: Mapping[str, str]


def unfounded(saved: SavedParity, precision: Precision) -> Iterator[str]:
    """Claims of a saved report that its own numbers, and the limits of `precision`, do not bear out."""
    report = saved.report
    if report.precision is not precision:
        yield f"it is about {report.precision}, and the manifest about {precision}"
    lacking = {CAST, FOLD, EXPORTED} - {rung.name for rung in report.rungs}
    if lacking or not report.witnesses or not report.probes:
        yield f"it is incomplete: {', '.join(sorted(lacking)) or 'nothing'} was judged by nobody"
        return
    for rung in report.rungs:
        yield from _unfounded_rung(rung, precision)
    stands = tuple(rung for rung in report.rungs if rung.name in (EXPORTED, COMPILED))
    if stands != witness_rungs(precision, report.witnesses):
        yield f"{' and '.join(rung.name for rung in stands)} is not what its witnesses come to"
    for seen in report.witnesses:
        for output in seen.outputs:
            for reason in _unfounded_output(output, seen.limit or TOLERANCES[precision].limit):
                yield f"{output.name} by {seen.witness.name} {reason}"
    if Verdict(saved.document["verdict"]) is not report.verdict:
        yield f"its verdict is {saved.document['verdict']}, and its rungs and witnesses come to {report.verdict}"


def _unfounded_rung(rung: Rung, precision: Precision) -> Iterator[str]:
    limits = {FOLD: FOLD_TOLERANCE, LOWERED: LOWERED_TOLERANCE, CAST: None, QUANTISED: None}
    tolerance = limits.get(rung.name, TOLERANCES[precision])
    limit = None if tolerance is None else tolerance.limit
    if rung.limit != limit:
        yield f"{rung.name} is judged by a limit of {rung.limit}, and has one of {limit}"
    if rung.verdict is Verdict.PASS and limit is not None and not (rung.rel or 0.0) <= limit:
        yield f"{rung.name} is called a pass, {rung.rel:.1e} with a limit of {limit:.0e}"


def _unfounded_output(output: OutputParity, limit: float) -> Iterator[str]:
    if limit not in {tolerance.limit for tolerance in TOLERANCES.values()}:
        yield f"is judged by a limit of {limit:.0e}, which is that of no precision"
    if output.max_abs is None:
        found = Verdict.FAIL  # a NaN, or another shape
    else:
        found = judged(output.rel, limit, output.noise_rel, telling=output.power >= MIN_POWER)
    if Verdict.worst([output.verdict, found]) is not output.verdict:
        rel = "unknown" if output.rel is None else f"{output.rel:.1e}"
        yield f"is called a {output.verdict}, with an error of {rel} and a power of {output.power:.2f}: {found}"
    # each image's error is divided by the spread or more
    if output.rel is not None and not output.rel * output.spread <= (output.max_abs or 0.0) * (1 + 1e-9):
        yield f"has a spread of {output.spread:.2e}, which its largest difference and its error do not have"


def read_parity(path: Path) -> SavedParity:
    """The parity.json at `path`. Raises UsageError when it cannot be read or is none."""
    document = _read(path)
    try:
        report = ParityReport(
            Precision(document["precision"]),
            int(document["probes"]),
            tuple(
                Rung(str(rung["name"]), _number(rung["rel"]), _number(rung["limit"]), Verdict(rung["verdict"]))
                for rung in document["rungs"]
            ),
            tuple(
                WitnessReport(
                    Witness(str(seen["name"]), WitnessKind(seen["kind"])),
                    tuple(_output(output) for output in seen["outputs"]),
                    _number(seen["accuracy"]),
                    _number(seen.get("limit")),
                    seen.get("images"),
                    Failure(**seen["failure"]) if seen.get("failure") else None,
                )
                for seen in document["witnesses"]
            ),
        )
        Verdict(document["verdict"])
        accuracy = document["accuracy"]
        return SavedParity(report, str(accuracy["metric"]), _number(accuracy["artifact"]), document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None


def read_latency(path: Path) -> SavedLatency | None:
    """The latency.json at `path`, None where nothing was measured. Raises UsageError when it cannot be read."""
    if not path.exists():
        return None
    document = _read(path)
    try:
        median, p95 = (_number(document["artifact"][name]) for name in ("median_s", "p95_s"))
        if median is None or p95 is None or median <= 0:
            raise ValueError("a time is not a positive number")
        return SavedLatency(median, p95, int(document["threads"]), int(document["batch"]), dict(document["host"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{path}' cannot be read: {error}",
            hint=f"name what `castling export` wrote ({path.name}), or export again",
        ) from None


def _output(item: Mapping[str, Any]) -> OutputParity:
    """One output; a number that this version knows and the file does not is None."""
    numbers = {
        field.name: _number(item.get(field.name))
        for field in fields(OutputParity)
        if field.name not in ("name", "verdict")
    }
    for name in ("spread", "noise_rel", "power"):
        if numbers[name] is None:
            raise ValueError(f"an output has no '{name}'")
    made: Any = {"name": str(item["name"]), **numbers, "verdict": Verdict(item["verdict"])}
    return OutputParity(**made)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"'{path}' is damaged: {type(error).__name__}: {error}", hint="export the artefact again")
