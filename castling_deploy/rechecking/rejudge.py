"""Another limit on the numbers of a parity.json: nothing is run, the rule of `parity.judged` is applied again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from castling_deploy.errors import UsageError
from castling_deploy.parity import COMPILED, EXPORTED, OutputParity, ParityReport, Verdict, judged
from castling_deploy.plain import SCHEMA, plain
from castling_deploy.rechecking.saved import SavedParity, read_parity


@dataclass(frozen=True)
class Rejudged:
    """What was saved, and what it comes to with `limit` on rel. The numbers of `report` are the saved ones, its `power`
    that of the saved limit."""

    path: Path
    limit: float
    saved: SavedParity
    report: ParityReport

    @property
    def verdict(self) -> Verdict:
        return self.report.verdict


def rejudge(path: str | Path, limit: float) -> Rejudged:
    """The saved numbers of every witness's outputs, judged with another limit on rel.

    An output whose limit is in its own unit (boxes in pixels) and rungs before the export keep their verdicts. Raises
    UsageError when the file is no parity.json, or does not tell how wide a limit its comparisons bear.
    """
    saved = read_parity(Path(path))
    if not all("widest_limit" in output for seen in saved.document["witnesses"] for output in seen["outputs"]):
        raise UsageError(
            f"'{path}' does not tell how wide a limit its comparisons bear",
            hint="it was written by an older castling-deploy: export again",
        )
    witnesses = tuple(
        replace(seen, outputs=tuple(_judged_again(output, limit) for output in seen.outputs))
        for seen in saved.report.witnesses
    )
    verdict = Verdict.worst([seen.verdict for seen in witnesses])
    rungs = tuple(
        replace(rung, limit=limit, verdict=verdict) if rung.name in (EXPORTED, COMPILED) else rung
        for rung in saved.report.rungs
    )
    return Rejudged(Path(path), limit, saved, replace(saved.report, rungs=rungs, witnesses=witnesses))


def _judged_again(output: OutputParity, limit: float) -> OutputParity:
    if output.max_abs is None or output.widest_limit is None:  # nothing to compare, or a limit of its own
        return output
    return replace(output, verdict=judged(output.rel, limit, output.noise_rel, telling=limit < output.widest_limit))


def rejudged_document(seen: Rejudged) -> dict[str, Any]:
    """What `castling verify --from --json` prints. The power with this limit is known only as enough or not."""
    return {
        "schema": SCHEMA,
        "path": seen.path,
        "limit": seen.limit,
        "verdict": seen.verdict,
        "saved": seen.saved.verdict,
        "rungs": [plain(rung) for rung in seen.report.rungs],
        "witnesses": [
            {
                "name": witness.witness.name,
                "kind": witness.witness.kind,
                "verdict": witness.verdict,
                "outputs": [
                    {**plain(output), "power": None, "saved": before.verdict}
                    for output, before in zip(witness.outputs, was.outputs, strict=True)
                ],
            }
            for witness, was in zip(seen.report.witnesses, seen.saved.report.witnesses, strict=True)
        ],
    }
