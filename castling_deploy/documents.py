"""The JSON documents: what machines read. Keys are stable, numbers that are not known are null."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castling_deploy.castle import LayerCast
from castling_deploy.identify import ModelCard
from castling_deploy.ladder import Ladder, Lowered
from castling_deploy.latency import LatencyReport, Timing
from castling_deploy.parity import ParityReport, WitnessReport
from castling_deploy.plain import plain
from castling_deploy.range_audit import SAFE_EPS, Audit
from castling_deploy.target import Precision, computes_in_half


def write(path: Path, document: Any) -> None:
    """One JSON document, indented, in UTF-8, the same bytes for the same content."""
    path.write_text(json.dumps(plain(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def checkpoint_document(card: ModelCard) -> dict[str, Any]:
    """Which file the weights are from, and what was taken off it."""
    return {
        "path": card.checkpoint_path,
        "sha256": card.checkpoint_sha256,
        "peeled": card.peeled,
        "tensors": card.loaded,
        "dropped": card.dropped,
        "init_dconv": card.init_dconv,
        "told": plain(card.told),
        "assumed": card.assumed,
        "warnings": card.warnings,
    }


def model_document(card: ModelCard, parameters: int) -> dict[str, Any]:
    """What the network is; `parameters` are those of the cast network."""
    return {**network_document(card), "parameters": parameters}


def network_document(card: ModelCard) -> dict[str, Any]:
    """What the network is, as far as its checkpoint tells."""
    return {
        "name": card.name,
        "family": card.family,
        "task": card.task,
        "reference": card.reference,
        "image_size": card.config.image_size,
        "classes": card.config.classes,
        "config": plain(card.config),
    }


def cast_document(ladder: Ladder) -> dict[str, Any]:
    """What the cast removed, layer by layer, and what it cost."""
    return {
        "rel": ladder.cast_rung.rel,
        "verdict": ladder.cast_rung.verdict,
        "accuracy_trained": ladder.trained_score,
        "accuracy_cast": ladder.reference_score,
        "layers": layers_document(ladder.layers),
    }


def layers_document(layers: Sequence[LayerCast]) -> list[dict[str, Any]]:
    """The evidence of the cast, layer by layer."""
    return [{"path": layer.path, **plain(layer.evidence), "can_vanish": layer.evidence.can_vanish} for layer in layers]


def fold_document(ladder: Ladder) -> dict[str, Any]:
    """Which folds were applied, and how exact they are in float64."""
    return {
        "rel_float64": ladder.fold_rung.rel,
        "verdict": ladder.fold_rung.verdict,
        "rules": dict(Counter(step.rule for step in ladder.steps)),
        "steps": [plain(step) for step in ladder.steps],
    }


def parity_document(report: ParityReport, ladder: Ladder) -> dict[str, Any]:
    """Verdict, power, every rung and every witness."""
    return {
        "verdict": report.verdict,
        "power": report.power,
        "precision": report.precision,
        "probes": report.probes,
        "accuracy": {
            "metric": ladder.task.metric,
            "trained": ladder.trained_score,
            "reference": ladder.reference_score,
            "artifact": report.witnesses[0].score if report.witnesses else None,
        },
        "cast": cast_document(ladder),
        "rungs": [plain(rung) for rung in report.rungs],
        "witnesses": [witness_document(seen) for seen in report.witnesses],
        "range_audit": audit_document(ladder.range_audit) if in_half(ladder, report) else None,
        "int8": None if ladder.in_8_bits is None else int8_document(ladder.in_8_bits),
    }


def in_half(ladder: Ladder, report: ParityReport) -> bool:
    """Whether the artefact computes in float16."""
    if ladder.in_8_bits is None:
        return report.precision is Precision.FP16
    return computes_in_half(report.precision, ladder.in_8_bits.quantisation.activations)


def int8_document(lowered: Lowered) -> dict[str, Any]:
    """What computes in 8 bits and in which range, what stays in float, and what that costs."""
    return {
        "activations": lowered.quantisation.activations,
        "palette": lowered.quantisation.palette,
        "weight_bits": lowered.quantisation.weight_bits,
        "drop": lowered.drop,
        "max_drop": lowered.max_drop,
        "labelled": lowered.labelled,
        "ranges": {path: list(ends) for path, ends in lowered.quantisation.ranges.items()},
        "results": {path: list(ends) for path, ends in lowered.quantisation.results.items()},
        "kept_in_float": lowered.kept,
        "ranking": dict(lowered.ranking),
    }


def audit_document(audit: Audit) -> dict[str, Any]:
    """What was kept in float32 and why, and the operations that come nearest to what float16 holds."""
    return {
        "images": audit.images,
        "operations": len(audit.ops),
        "rel_rounded": audit.profile.whole,
        "islands": [plain(island) for island in audit.islands],
        "wide_reductions": [plain(island) for island in audit.reductions],
        "value_scaling": {
            "used": len(audit.scalings),
            "needed": sum(scaling.needed for scaling in audit.scalings),
            "largest_square_sum": max((scaling.square_sum for scaling in audit.scalings), default=None),
            "without_it": max((scaling.unscaled for scaling in audit.scalings), default=None),
        },
        "eps": {
            "safe_from": SAFE_EPS,
            "below": len(audit.unsafe_eps),
            "smallest": min((op.constant for op in audit.unsafe_eps if op.constant), default=None),
            "smallest_guarded": min((op.guarded for op in audit.unsafe_eps if op.guarded is not None), default=None),
        },
        "least_headroom": [
            {**plain(op), "headroom_bits": op.headroom_bits, "expected_error": op.expected_error}
            for op in audit.least_headroom
        ],
    }


def witness_document(seen: WitnessReport) -> dict[str, Any]:
    """Who ran the artefact, and what came of it."""
    return {
        "name": seen.witness.name,
        "kind": seen.witness.kind,
        "verdict": seen.verdict,
        "accuracy": seen.score,
        "images": seen.images,
        "limit": seen.limit,
        "failure": None if seen.failure is None else plain(seen.failure),
        "outputs": [plain(output) for output in seen.outputs],
    }


def latency_document(report: LatencyReport | None) -> dict[str, Any] | None:
    """Medians, p95 and every raw time; None where nothing was measured."""
    if report is None:
        return None

    def timing(subject: Timing) -> dict[str, Any]:
        return {
            "median_s": subject.median_s,
            "p95_s": subject.p95_s,
            "min_s": subject.min_s,
            "times_s": subject.times_s,
        }

    return {
        "runtime": report.runtime,
        "threads": report.threads,
        "batch": report.batch,
        "artifact": timing(report.artifact),
        "pytorch_eager": timing(report.reference),
        "ratio": report.ratio,
        "warnings": report.warnings,
        "host": report.host,
    }
