"""Verifying and measuring one artefact: its witness runs it on the probes, the ladder says what it should have said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from castling_deploy.errors import ExportError
from castling_deploy.execution import inputs_for, repeated, run_artifact
from castling_deploy.ladder import Ladder
from castling_deploy.latency import LatencyReport, doubts, host, interleaved
from castling_deploy.parity import (
    EXPORTED,
    TOLERANCES,
    Array,
    OutputParity,
    ParityReport,
    Reference,
    Rung,
    Tolerance,
    WitnessReport,
    compare,
    worst,
)
from castling_deploy.quiet import toolchain
from castling_deploy.target import Artifact, Precision, Session, Target, images_for
from castling_deploy.task import Derived, Outputs, Task


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
    """Run the artefact on the probes and compare every output; the report holds every rung of the ladder.

    A witness that is too slow for all probes gets the first of the real images, and every other probe. It is not
    scored: the task's score of few images says nothing beside that of all.
    """
    affordable = images_for(target, precision)
    probes = ladder.probes if affordable is None else ladder.probes.few(affordable)
    inputs = inputs_for(artifact.inputs[0], probes)
    with opened(target, folder) as session:
        outputs = run_artifact(session, artifact, inputs, advance)
        witness = session.witness
    rows = ladder.probes.rows(probes)[: len(inputs)]
    references = {
        name: replace(reference, outputs=reference.outputs[rows], real=probes.real)
        for name, reference in ladder.references.items()
    }
    scored = references.keys() <= outputs.keys() and probes.real == ladder.probes.real
    report = WitnessReport(
        witness,
        compared(ladder.task, outputs, references, TOLERANCES[precision], probes.preprocessing.size),
        ladder.score(outputs) if scored else None,
    )
    rel = worst(output.rel for output in report.outputs)
    exported = Rung(EXPORTED, rel, TOLERANCES[precision].limit, report.verdict)
    return ParityReport(precision, len(inputs), (ladder.cast_rung, ladder.fold_rung, exported), (report,))


def compared(
    task: Task,
    outputs: Outputs,
    references: Mapping[str, Reference],
    tolerance: Tolerance,
    size: tuple[int, int],
) -> tuple[OutputParity, ...]:
    """The network's outputs against the reference, then what the artefact adds against what follows from its own.

    `size` is (H, W) of the input in pixels. Raises ExportError for an output that is missing, or of which nothing is
    known.
    """
    missing = references.keys() - outputs.keys()
    if missing:
        raise ExportError(f"the artefact lacks the outputs {sorted(missing)}", hint="report this target")
    own = [
        compare(
            name, outputs[name], reference, tolerance, reference.power(tolerance), reference.widest_limit(tolerance)
        )
        for name, reference in references.items()
    ]
    added = [name for name in outputs if name not in references]
    if not added or any(parity.max_abs is None for parity in own):
        return tuple(own)  # from outputs that cannot be compared, nothing follows
    derived = task.derived(outputs, size)
    unknown = [name for name in added if name not in derived]
    if unknown:
        known = ", ".join(references)
        raise ExportError(
            f"nothing is known of the artefact's output '{unknown[0]}'", hint=f"the network's own: {known}"
        )
    source = next(iter(references.values()))
    return *own, *(_followed(name, outputs[name], derived[name], source, tolerance) for name in added)


def _followed(name: str, values: Array, derived: Derived, source: Reference, tolerance: Tolerance) -> OutputParity:
    """An output that follows from those of the artefact; `source` is the reference of the first of them."""
    unit = None if derived.limit is None else derived.limit / tolerance.limit
    follows = Reference(derived.expected, source.real, noise=0.0, unit=unit)
    power = source.power(tolerance) if derived.power is None else derived.power
    widest_limit = source.widest_limit(tolerance) if unit is None else None
    return compare(name, values, follows, tolerance, power, widest_limit)


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
