"""Verifying and measuring one artefact: its witness runs it on the probes, the ladder says what it should have said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from castling_deploy.errors import ExportError
from castling_deploy.execution import inputs_for, repeated, run_artifact
from castling_deploy.ladder import Ladder
from castling_deploy.latency import LatencyReport, doubts, host, interleaved
from castling_deploy.parity import (
    TOLERANCES,
    ParityReport,
    Reference,
    Rung,
    WitnessReport,
    compare,
    top1_accuracy,
)
from castling_deploy.quiet import toolchain
from castling_deploy.target import Artifact, Precision, Session, Target


@contextmanager
def opened(target: Target, folder: Path, threads: int = 1) -> Iterator[Session]:
    """The artefact's session, with the runtime's noise held back. What goes wrong inside is an ExportError."""
    with toolchain(f"{target.name}: the artefact does not run"), target.load(folder, threads=threads) as session:
        yield session


def verify_artifact(
    target: Target,
    artifact: Artifact,
    folder: Path,
    ladder: Ladder,
    precision: Precision,
    advance: Callable[[float], None] = lambda share: None,
) -> ParityReport:
    """Run the artefact on all probes and compare every output; the report holds every rung of the ladder."""
    inputs = inputs_for(artifact.inputs[0], ladder.probes)
    with opened(target, folder) as session:
        outputs = run_artifact(session, artifact, inputs, advance)
        witness = session.witness
    reference = replace(ladder.reference, outputs=ladder.reference.outputs[: len(inputs)])
    tolerance = TOLERANCES[precision]
    power = reference.power(tolerance)
    compared = tuple(
        compare(name, values, expected(name, reference), tolerance, power) for name, values in outputs.items()
    )
    report = WitnessReport(witness, compared, top1_accuracy(outputs["logits"], ladder.probes.labels))
    worst = max((output.rel for output in compared if output.rel is not None), default=None)
    return ParityReport(
        precision,
        power=power,
        spread=reference.spread,
        noise_rel=reference.noise_rel(tolerance),
        probes=len(inputs),
        rungs=(ladder.cast_rung, ladder.fold_rung, Rung("exported", worst, tolerance.limit, report.verdict)),
        witnesses=(report,),
    )


def expected(name: str, logits: Reference) -> Reference:
    """What the reference says of the output `name`: the logits, or the probabilities that follow from them."""
    if name == "logits":
        return logits
    if name == "probabilities":
        outputs = Reference(torch.from_numpy(logits.outputs).softmax(-1).numpy(), logits.real, noise=0.0)
        amplified = logits.spread / outputs.spread if outputs.spread else 0.0
        return replace(outputs, noise=logits.noise * amplified)  # softmax itself amplifies nothing (Lipschitz 1)
    raise ExportError(
        f"nothing is known of the artefact's output '{name}'", hint="name outputs 'logits' or 'probabilities'"
    )


def measure(target: Target, artifact: Artifact, folder: Path, ladder: Ladder, threads: int = 1) -> LatencyReport:
    """Latency of the artefact beside PyTorch eager on the folded network, in one run."""
    (spec,) = artifact.inputs
    batch = spec.shape[0] if spec.shape[0] > 0 else 1
    feed = repeated(inputs_for(spec, ladder.probes), batch)
    tensors = torch.from_numpy(repeated(ladder.probes.tensors, batch))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with opened(target, folder, threads) as session, torch.inference_mode():
            timings = interleaved(
                {
                    session.witness.name: lambda: session({spec.name: feed}),
                    "PyTorch eager": lambda: ladder.folded(tensors),
                }
            )
            artifact_timing, reference_timing = timings.values()
            return LatencyReport(
                session.witness.name, artifact_timing, reference_timing, threads, batch, host(), doubts(timings)
            )
    finally:
        torch.set_num_threads(threads_before)
