"""The whole tool on one screen: read -> identify -> castle -> fold -> export -> verify -> measure -> report.

Each step is a pure function of its own module; each target is one file in `export/`. No format's name occurs here.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from castling_deploy import artifact as written
from castling_deploy import bundled, checkpoint
from castling_deploy.errors import CastlingError, UsageError
from castling_deploy.folder import artifact_folder, refuse_if_taken
from castling_deploy.identify import ModelCard, identify
from castling_deploy.int8.sensitivity import in_8_bits
from castling_deploy.isolation import Worker
from castling_deploy.ladder import Ladder, climb
from castling_deploy.latency import LatencyReport, timed
from castling_deploy.localising.fault import Suspect, isolated_fault
from castling_deploy.localising.localisation import Localisation
from castling_deploy.parity import ParityReport, Verdict
from castling_deploy.probes import probes_for
from castling_deploy.progress import Progress, Silent
from castling_deploy.quiet import toolchain
from castling_deploy.request import Request, Step, plan
from castling_deploy.target import Artifact, Missing, Network, Precision, activations_of, refuse_for_task
from castling_deploy.task import task_named
from castling_deploy.verification import lowered_rung, measure, verify_artifact


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


@dataclass(frozen=True)
class Deployment:
    """Everything that `deploy` found out."""

    card: ModelCard
    ladder: Ladder
    results: tuple[Result, ...]


def deploy(request: Request, progress: Progress | None = None) -> Deployment:
    """Export, verify and measure. Raises CastlingError for what concerns the network; what concerns one target is
    in its Result, so that one target's trouble costs no other target its artefact."""
    progress = progress or Silent()
    plan(request)  # refuses before anything is read
    with progress.stage("read and identify the checkpoint"):
        path = request.checkpoint or bundled.checkpoint_path(request.model or bundled.DEFAULT)
        network, card = identify(
            checkpoint.read(path), model=request.model, image_size=request.image_size, init_dconv=request.init_dconv
        )
    return deploy_network(request, network, card, progress)


def deploy_network(
    request: Request, network: nn.Module, card: ModelCard, progress: Progress | None = None
) -> Deployment:
    """`deploy` for a network that is loaded already, in training form and eval mode."""
    progress = progress or Silent()
    steps = plan(request)
    if network.training:
        raise UsageError("the network is in training mode", hint="call network.eval() before export")
    for step in steps:
        refuse_for_task(step.target, step.options, card.task)
        refuse_if_taken(folder_of(request, card, step), overwrite=request.overwrite)
    with progress.stage("castle, fold, and run the reference") as advance:
        probes = probes_for(card.preprocessing, card.samples, request.seed).affordable(card.output_values)
        task = task_named(card.task)
        ladder = climb(network, task, card.outputs, probes, advance, already_cast=card.already_cast)
    return Deployment(card, ladder, tuple(produce(request, step, card, ladder, progress) for step in steps))


def folder_of(request: Request, card: ModelCard, step: Step) -> Path:
    """<output>/<model>-<target>-<precision>."""
    return request.output / f"{card.name}-{step.target.name}-{step.precision}"


def produce(request: Request, step: Step, card: ModelCard, ladder: Ladder, progress: Progress) -> Result:
    """One artefact: exported, verified, measured, described, and only then given its name."""
    missing = step.target.missing()
    if missing is not None:
        return Result(step, missing=missing)
    path = folder_of(request, card, step)
    name = step.target.name
    try:
        with ExitStack() as stack:
            # Two processes, which start side by side: the one that runs the artefact has never seen the network.
            maker = stack.enter_context(Worker(request.limits))
            witness = stack.enter_context(Worker(request.limits))
            folder = stack.enter_context(artifact_folder(path, overwrite=request.overwrite))
            if step.precision is Precision.INT8:
                with progress.stage(f"{name}: calibrate") as advance:
                    ladder = in_8_bits(ladder, request.int8, activations_of(step.target), advance)
            with progress.stage(f"{name}: export {step.precision}"):
                audit = ladder.range_audit if request.islands and step.precision is Precision.FP16 else None
                levels = ladder.in_8_bits.quantisation if ladder.in_8_bits else None
                network = written.network_for(card, ladder.folded, request.batch_size, audit, levels)
                artifact = maker.call("export", exported, step, network, folder)
                lowered = lowered_rung(step.target, network, step.options, ladder, maker.call)
            with progress.stage(f"{name}: verify") as advance:
                parity = verify_artifact(
                    step.target, artifact, folder, ladder, step.precision, advance, witness.call, lowered
                )
            latency = None
            if request.benchmark and timed(step.target.witness()):
                with progress.stage(f"{name}: measure latency"):
                    latency = measure(step.target, artifact, folder, ladder, call=witness.call)
            written.describe(folder, card, ladder, step.target, step.precision, step.options, artifact, parity, latency)
        made = Result(step, path, artifact, parity, latency, artifact.unfinished)
    except CastlingError as error:
        return Result(step, error=error)
    if not request.localise or parity.verdict is not Verdict.FAIL or step.precision is Precision.INT8:
        return made  # what 8 bits hurt is ranked in parity.json already
    with suppress(CastlingError):  # that the artefact is wrong is known already, and is what has to be told
        suspect = Suspect(step.target, network, step.precision, step.options, artifact, path, fresh=True)
        return replace(made, localisation=isolated_fault(suspect, ladder.probes, progress, request.limits))
    return made


def exported(step: Step, network: Network, folder: Path) -> Artifact:
    """The toolchain's part, which writes into `folder`. Raises ExportError."""
    with toolchain(step.target.name):
        artifact = step.target.export(network, step.precision, step.options, folder)
    return replace(
        artifact, details={**artifact.details, "islands": network.islands, "wide_reductions": network.reductions}
    )
