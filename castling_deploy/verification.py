"""Verifying and measuring one artefact: its witness runs it on the probes, the ladder says what it should have said."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from castling_deploy.errors import ExportError
from castling_deploy.execution import inputs_for, repeated
from castling_deploy.isolation import Call, here
from castling_deploy.ladder import Ladder, exact_rung, run
from castling_deploy.latency import LatencyReport, doubts, host, interleaved
from castling_deploy.parity import (
    LOWERED,
    LOWERED_TOLERANCE,
    TOLERANCES,
    Array,
    OutputParity,
    ParityReport,
    Reference,
    Rung,
    Tolerance,
    WitnessReport,
    compare,
    witness_rungs,
)
from castling_deploy.progress import Advance
from castling_deploy.provenance import shared_provenance
from castling_deploy.quiet import toolchain
from castling_deploy.runner import Runner, arithmetic_of, required_for
from castling_deploy.target import Artifact, Network, Precision, Session, Target, TensorSpec, Witness, WitnessKind
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
    advance: Advance = lambda share: None,
    call: Call = here,
    lowered: Rung | None = None,
) -> ParityReport:
    """Its own witness, and who else is required, run the artefact on all probes, and every output is compared."""
    reports = tuple(
        witnessed(runner, artifact, folder, ladder, precision, advance, call)
        for runner in required_for(target, precision)
    )
    return parity_report(ladder, precision, reports, lowered)


def parity_report(
    ladder: Ladder, precision: Precision, witnesses: tuple[WitnessReport, ...], lowered: Rung | None = None
) -> ParityReport:
    """Every rung of the ladder; on the last stand the witnesses that computed in this precision."""
    before = [ladder.cast_rung, ladder.fold_rung]
    before += [] if ladder.in_8_bits is None else [ladder.in_8_bits.rung]
    before += [] if lowered is None else [lowered]
    rungs = (*before, *witness_rungs(precision, witnesses))
    return ParityReport(precision, witnesses[0].images or 0, rungs, witnesses)


def lowered_rung(target: Target, network: Network, options: Any, ladder: Ladder, call: Call = here) -> Rung:
    """What the target's rewrites change: nothing but the rounding of constants. Raises ExportError."""
    return judged_lowering(ladder, call("lower", run_lowered, target, network, options, ladder.few.tensors))


def judged_lowering(ladder: Ladder, outputs: Outputs) -> Rung:
    """The rung of `run_lowered`'s outputs on `ladder.few`."""
    return exact_rung(LOWERED, ladder.exact, outputs, LOWERED_TOLERANCE)


def run_lowered(target: Target, network: Network, options: Any, tensors: Array) -> Outputs:
    """What the graph that `target` hands its converter computes in float64 on `tensors` (P, C, H, W). Raises
    ExportError."""
    with toolchain(f"{target.name}: lowering"), shared_provenance():
        module = copy.deepcopy(target.lowered(network, options)).double()  # the network shares its tensors
    batch = network.inputs[0].shape[0]
    names = [spec.name for spec in network.outputs]
    filled = repeated(tensors.astype(np.float64), -(-len(tensors) // batch) * batch)
    outputs = run(module, names, filled, batch)
    return {name: values[: len(tensors)] for name, values in outputs.items()}


def witnessed(
    runner: Runner,
    artifact: Artifact,
    folder: Path,
    ladder: Ladder,
    precision: Precision,
    advance: Advance = lambda share: None,
    call: Call = here,
) -> WitnessReport:
    """What `runner` makes of the probes; one that is too slow gets the first of the real images, and every other probe.

    It is not scored then: the task's score of few images says nothing beside that of all.
    """
    probes = ladder.probes if not runner.images else ladder.probes.few(runner.images)
    inputs = inputs_for(artifact.inputs[0], probes)
    witness, outputs = observed(runner, artifact, folder, inputs, advance, call)
    rows = ladder.probes.rows(probes)[: len(inputs)]
    references = {
        name: replace(reference, outputs=reference.outputs[rows], real=probes.real)
        for name, reference in ladder.expected.items()
    }
    report = testimony(runner, witness, outputs, references, ladder.task, precision, ladder.probes.preprocessing.size)
    complete = references.keys() <= outputs.keys() and probes.real == ladder.probes.real
    return replace(report, score=ladder.score(outputs) if complete else None)


def observed(
    runner: Runner,
    artifact: Artifact,
    folder: Path,
    inputs: npt.NDArray[np.generic],
    advance: Advance = lambda share: None,
    call: Call = here,
) -> tuple[Witness, Outputs]:
    """Who ran the artefact on `inputs` (P, ...), and every output by name."""
    return call(f"{runner.name}: run the artefact", _observe, runner, artifact, folder, inputs, advance=advance)


def _observe(
    runner: Runner, artifact: Artifact, folder: Path, inputs: npt.NDArray[np.generic], advance: Advance
) -> tuple[Witness, Outputs]:
    with toolchain(f"{runner.name}: the artefact does not run"):
        outputs = runner.run(folder, artifact, inputs, advance)
    return runner.witness(), {name: np.asarray(values) for name, values in outputs.items()}


def testimony(
    runner: Runner,
    witness: Witness,
    outputs: Outputs,
    references: Mapping[str, Reference],
    task: Task,
    precision: Precision,
    size: tuple[int, int],
) -> WitnessReport:
    """The outputs of a witness, compared by the limit of the arithmetic it computes in."""
    images = len(next(iter(references.values())).outputs)
    if witness.kind is WitnessKind.BUILDER:
        return WitnessReport(witness, (), None, images=0)
    tolerance = TOLERANCES[arithmetic_of(runner, precision)]
    return WitnessReport(witness, compared(task, outputs, references, tolerance, size), None, tolerance.limit, images)


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


def measure(
    target: Target, artifact: Artifact, folder: Path, ladder: Ladder, threads: int = 1, call: Call = here
) -> LatencyReport:
    """Latency of the artefact beside PyTorch eager on the folded network, in one run."""
    (spec,) = artifact.inputs
    batch = spec.shape[0] if spec.shape[0] > 0 else 1
    feed = repeated(inputs_for(spec, ladder.probes), batch)
    tensors = repeated(ladder.probes.tensors, batch)
    return call("measure", _measure, target, spec, folder, feed, ladder.folded, tensors, threads)


def _measure(
    target: Target,
    spec: TensorSpec,
    folder: Path,
    feed: npt.NDArray[np.generic],
    network: nn.Module,
    inputs: Array,
    threads: int,
) -> LatencyReport:
    tensors = torch.from_numpy(inputs)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with opened(target, folder, threads) as session, torch.inference_mode():
            timings = interleaved(
                {
                    session.witness.name: lambda: session({spec.name: feed}),
                    "PyTorch eager": lambda: network(tensors),
                }
            )
            artifact_timing, reference_timing = timings.values()
            return LatencyReport(
                session.witness.name, artifact_timing, reference_timing, threads, len(feed), host(), doubts(timings)
            )
    finally:
        torch.set_num_threads(threads_before)
