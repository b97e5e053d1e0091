"""The JSON documents of the commands, and the exit code of each result of a deployment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castling_deploy import documents
from castling_deploy.errors import InconclusiveError, ParityError, TargetUnavailableError
from castling_deploy.folder import files_in, size_bytes
from castling_deploy.making import Result
from castling_deploy.parity import Verdict
from castling_deploy.pipeline import Deployment
from castling_deploy.plain import SCHEMA, plain
from castling_deploy.rechecking.checks import Examined
from castling_deploy.rechecking.comparison import Comparison, Side
from castling_deploy.undecided import why_undecided


def deployment_document(deployment: Deployment) -> dict[str, Any]:
    """What `castling export --json` prints."""
    ladder, card = deployment.ladder, deployment.card
    return {
        "schema": SCHEMA,
        "checkpoint": documents.checkpoint_document(card),
        "model": documents.model_document(card, ladder.parameters),
        "cast": documents.cast_document(ladder),
        "fold": documents.fold_document(ladder),
        "artifacts": [artifact_document(result, deployment) for result in deployment.results],
    }


def artifact_document(result: Result, deployment: Deployment) -> dict[str, Any]:
    """One artefact of the document; what does not exist is null."""
    files = files_in(result.path) if result.path is not None else []
    parity = None if result.parity is None else documents.parity_document(result.parity, deployment.ladder)
    return {
        "target": result.step.target.name,
        "precision": result.step.precision,
        "path": result.path,
        "files": [path.as_posix() for path in files],
        "bytes": model_bytes(result),
        "parity": parity,
        "latency": documents.latency_document(result.latency),
        "details": None if result.artifact is None else result.artifact.details,
        "localisation": None if result.localisation is None else plain(result.localisation),
        "status": status(result),
        "reason": reason(result),
    }


def model_bytes(result: Result) -> int | None:
    """The size of the model itself, without what is written beside it; None where there is none."""
    if result.path is None or result.artifact is None:
        return None
    return size_bytes(result.path, result.artifact.files)


def status(result: Result) -> str:
    """ok, failed or unavailable."""
    if result.error is not None or (result.parity is not None and result.parity.verdict is Verdict.FAIL):
        return "failed"
    return "unavailable" if result.missing is not None else "ok"


def reason(result: Result) -> str | None:
    """Why the status is not ok, or why an ok one is in doubt, with the fix."""
    if result.error is not None:
        return str(result.error)
    if result.parity is not None and result.parity.verdict is not Verdict.PASS:
        return f"parity {result.parity.verdict}: {why_undecided(result.parity) or 'see parity.json'}"
    if result.missing is not None:
        return f"{result.missing.reason}; to mend it: {result.missing.fix}"
    return None


def exit_code(result: Result) -> int:
    """The exit code this result stands for."""
    if result.error is not None:
        return result.error.exit_code
    if result.parity is not None and result.parity.verdict is Verdict.FAIL:
        return ParityError.exit_code
    if result.parity is not None and result.parity.verdict is Verdict.INCONCLUSIVE:
        return InconclusiveError.exit_code
    return TargetUnavailableError.exit_code if result.missing is not None else 0


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """What `castling diff --json` prints; what cannot be compared is null, and says why."""
    regression = comparison.regression
    return {
        "schema": SCHEMA,
        "a": _side_document(comparison.a),
        "b": _side_document(comparison.b),
        "differences": [plain(difference) for difference in comparison.differences],
        "parity_regressed": comparison.parity_regressed,
        "quantities": [plain(quantity) for quantity in comparison.quantities],
        "regression": None if regression is None else regression.message,
        "exit_code": 0 if regression is None else regression.exit_code,
    }


def _side_document(side: Side) -> dict[str, Any]:
    return {
        "path": side.folder.path,
        "model": side.folder.manifest["model"].get("name"),
        "task": side.folder.task,
        "target": side.folder.target,
        "precision": side.folder.precision,
        "checkpoint_sha256": side.folder.checkpoint_sha256,
        "verdict": side.verdict,
    }


def verification_document(examined: Sequence[Examined]) -> dict[str, Any]:
    """What `castling verify --json` prints: one folder's document, or those of several as `artifacts`."""
    found = [_examined_document(seen) for seen in examined]
    return {"schema": SCHEMA, **found[0]} if len(found) == 1 else {"schema": SCHEMA, "artifacts": found}


def _examined_document(seen: Examined) -> dict[str, Any]:
    recheck, error = seen.recheck, seen.error
    parity = None
    if recheck is not None and recheck.parity is not None and recheck.ladder is not None:
        parity = documents.parity_document(recheck.parity, recheck.ladder)
    return {
        "path": seen.path,
        "verdict": seen.verdict,
        "attestation": None if recheck is None else plain(recheck.claims.attestation),
        "exported": None if recheck is None else recheck.folder.verdict,
        "golden": documents.witness_document(recheck.golden[0]) if recheck and recheck.golden else None,
        "witnesses": [] if recheck is None else [documents.witness_document(report) for report in recheck.golden],
        "not_run": [] if recheck is None else [plain(absent) for absent in recheck.absent],
        "parity": parity,
        "checks": [plain(check) for check in seen.checks],
        "localisation": None if seen.localisation is None else plain(seen.localisation),
        "exit_code": seen.exit_code,
        "error": None if error is None else {"message": error.message, "hint": error.hint},
    }
