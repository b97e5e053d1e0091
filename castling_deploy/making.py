"""One artefact: exported and verified, then measured and described, and only then given its name.

Others may still be made while one is verified, and not while one is measured. So `made` ends with what is left to do,
as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from castling_deploy import artifact as written
from castling_deploy.climbing import Climbing
from castling_deploy.errors import CastlingError
from castling_deploy.folder import artifact_folder
from castling_deploy.identify import ModelCard
from castling_deploy.int8.held import require_held
from castling_deploy.int8.sensitivity import in_8_bits
from castling_deploy.isolation import Worker
from castling_deploy.latency import LatencyReport, timed
from castling_deploy.localising.fault import Suspect, isolated_fault
from castling_deploy.localising.localisation import Localisation
from castling_deploy.parity import Array, ParityReport, Verdict
from castling_deploy.progress import Progress
from castling_deploy.provenance import shared_provenance
from castling_deploy.quiet import toolchain
from castling_deploy.request import Request, Step
from castling_deploy.target import Artifact, Missing, Network, Precision
from castling_deploy.task import Outputs
from castling_deploy.traces import traced_once
from castling_deploy.verification import judged_lowering, measure, run_lowered, verify_artifact


@dataclass(frozen=True)
class Result:
    """One artefact that was made, or the error that kept it from being made."""

    step: Step
    path: Path | None = None
    artifact: Artifact | None = None
    parity: ParityReport | None = None
    latency: LatencyReport | None = None
    missing: Missing | None = None
    error: CastlingError | None = None
    localisation: Localisation | None = None


# What is left to do; its argument says whether the artefact is measured where it can be.
Finish = Callable[[bool], Result]


def folder_of(request: Request, card: ModelCard, step: Step) -> Path:
    """<output>/<model>-<target>-<precision>."""
    return request.output / f"{card.name}-{step.target.name}-{step.precision}"


def made(
    request: Request,
    step: Step,
    card: ModelCard,
    climbing: Climbing,
    progress: Progress,
    started: Callable[[Worker], None] = lambda worker: None,
) -> Finish:
    """An artefact that is exported and verified, in a hidden folder. `started` is told of every process.

    One that `needs_ladder` not to be exported may be begun while the reference still runs.
    """
    missing = step.target.missing()
    if missing is not None:
        return settled(Result(step, missing=missing))
    path = folder_of(request, card, step)
    name = step.target.name
    try:
        with ExitStack() as making, ExitStack() as kept:
            folder = kept.enter_context(artifact_folder(path, overwrite=request.overwrite))
            # Two processes, which start side by side: the one that runs the artefact has never seen the network.
            maker = making.enter_context(Worker(request.limits))
            witness = kept.enter_context(Worker(request.limits))
            started(maker)
            started(witness)
            ladder = climbing.ladder if needs_ladder(request, step) else None
            if ladder and step.precision is Precision.INT8:
                with progress.stage(f"{name}: calibrate") as advance:
                    ladder = in_8_bits(ladder, request.int8, step.options.form, advance)
            with progress.stage(f"{name}: export {step.precision}"):
                audit = ladder.range_audit if ladder and request.islands and step.in_half else None
                levels = ladder.in_8_bits.quantisation if ladder and ladder.in_8_bits else None
                network = written.network_for(card, climbing.folded, request.batch_size, audit, levels)
                artifact, outputs = maker.call("export", exported, step, network, folder, climbing.few.tensors)
                ladder = ladder or climbing.ladder
                lowered = judged_lowering(ladder, outputs)
            with progress.stage(f"{name}: verify") as advance:
                parity = verify_artifact(
                    step.target, artifact, folder, ladder, step.precision, advance, witness.call, lowered
                )
            left = kept.pop_all()
    except CastlingError as error:
        return settled(Result(step, error=error))

    def finish(measured: bool) -> Result:
        try:
            with left:
                latency = None
                if measured and timed(step.target.witness()):
                    with progress.stage(f"{name}: measure latency"):
                        latency = measure(step.target, artifact, folder, ladder, call=witness.call)
                written.describe(
                    folder, card, ladder, step.target, step.precision, step.options, artifact, parity, latency
                )
            result = Result(step, path, artifact, parity, latency, artifact.unfinished)
        except CastlingError as error:
            return Result(step, error=error)
        if not request.localise or parity.verdict is not Verdict.FAIL or step.precision is Precision.INT8:
            return result  # what 8 bits hurt is ranked in parity.json already
        with suppress(CastlingError):  # that the artefact is wrong is known already, and is what has to be told
            suspect = Suspect(step.target, network, step.precision, step.options, artifact, path, fresh=True)
            return replace(result, localisation=isolated_fault(suspect, ladder.probes, progress, request.limits))
        return result

    waits = request.benchmark and timed(step.target.witness())
    return finish if waits else settled(finish(False))


def needs_ladder(request: Request, step: Step) -> bool:
    """Whether what is exported hangs on what the reference computes: in 8 bits, and where float16 is audited."""
    return step.precision is Precision.INT8 or (request.islands and step.in_half)


def settled(result: Result) -> Finish:
    """Nothing is left to do."""
    return lambda measured: result


def exported(step: Step, network: Network, folder: Path, tensors: Array) -> tuple[Artifact, Outputs]:
    """The toolchain's part, which writes into `folder`, and what its graph computes in float64 on `tensors`. Raises
    ExportError."""
    with traced_once():
        lowered = run_lowered(step.target, network, step.options, tensors)  # before a converter rewrites its graph
        with toolchain(step.target.name), shared_provenance():
            artifact = step.target.export(network, step.precision, step.options, folder)
            require_held(step.target, folder, network)
    details = {**artifact.details, "islands": network.islands, "wide_reductions": network.reductions}
    return replace(artifact, details=details), lowered
