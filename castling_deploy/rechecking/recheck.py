"""Checking and timing an artefact folder after its export, on this machine or another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from castling_deploy.artifact import Folder, network_for, read_folder
from castling_deploy.errors import CrashError, ExportError, ParityError, TargetUnavailableError
from castling_deploy.execution import inputs_for, repeated
from castling_deploy.identify import ModelCard
from castling_deploy.int8.held import misheld
from castling_deploy.int8.sensitivity import in_saved_8_bits
from castling_deploy.isolation import Call, Limits, Worker
from castling_deploy.ladder import Ladder
from castling_deploy.latency import Timing, interleaved, timed
from castling_deploy.localising.rebuilt import rebuilt
from castling_deploy.parity import Failure, ParityReport, Rung, Verdict, WitnessReport
from castling_deploy.probes import Probes
from castling_deploy.progress import Advance, Progress, Silent
from castling_deploy.rechecking.claims import Claims, coherent, read_back
from castling_deploy.rechecking.golden import read_golden
from castling_deploy.rechecking.saved import PARITY, SavedParity, read_parity
from castling_deploy.runner import ALL, Runner, chosen, require_known, runners_of, unfit
from castling_deploy.target import Missing, Precision, Target, options_for, target_named
from castling_deploy.task import task_named
from castling_deploy.verification import lowered_rung, observed, opened, parity_report, testimony, witnessed


@dataclass(frozen=True)
class Absent:
    """A runner that was asked for by `all` and is not here."""

    name: str
    missing: Missing


@dataclass(frozen=True)
class Recheck:
    """What a second look at a folder found: against its golden outputs, and against the checkpoint if it was named.

    `saved` is what its export found. `golden` has a report for every runner that was asked for and is here; none where
    the model's files contradict the manifest, and nothing was run.
    """

    folder: Folder
    saved: SavedParity
    claims: Claims
    golden: tuple[WitnessReport, ...]
    absent: tuple[Absent, ...] = ()
    ladder: Ladder | None = None
    parity: ParityReport | None = None

    @property
    def contradicted(self) -> bool:
        """Whether the model's files are something else than the manifest claims, so that nothing was run."""
        return bool(self.claims.contradictions) and not self.golden

    @property
    def verdict(self) -> Verdict:
        """The golden images are few: without a new comparison, the verdict of the export counts beside theirs."""
        again = self.parity.verdict if self.parity else self.folder.verdict
        built = Verdict.FAIL if self.claims.contradictions else Verdict.PASS
        return Verdict.worst([built, *(report.verdict for report in self.golden), again])


def verify(
    path: str | Path,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    *,
    on: Sequence[str] = (),
    limits: Limits | None = None,
) -> Recheck:
    """Hashes, golden outputs, and with `checkpoint` the whole comparison again.

    `on` names who runs the artefact (see `castling doctor`; "all": whoever can): without it, the target's own runtime.
    Every one has a process of its own within `limits`, so that a crash is that witness's verdict.

    Raises ParityError when a file was changed after the export, or the checkpoint is another one; UsageError when the
    folder is no artefact or a name of `on` is unknown; TargetUnavailableError when a named runtime is not here.
    """
    progress, limits = progress or Silent(), limits or Limits()
    require_known(on)
    with progress.stage("check the files against the manifest"):
        folder = read_folder(Path(path))
        changed = folder.changed()
        if changed:
            raise ParityError(
                f"'{path}' is not as it was exported; changed, missing or added: {', '.join(changed)}",
                hint="export it again; a changed artefact has not been verified",
            )
    saved = read_parity(folder.path / PARITY)
    target = target_named(folder.target)
    with progress.stage(f"{target.name}: read back what was built"):
        claims = read_back(target, folder, limits)
        if claims.contradictions:  # it is something else than it claims: what it computes proves nothing
            return Recheck(folder, saved, claims, ())
        golden = read_golden(folder)
        claims = coherent(claims, target, folder, golden, saved)
    able, absent = _able(target, folder, on)
    inputs = inputs_for(folder.artifact.inputs[0], Probes.of(golden.images, folder.preprocessing))
    task, size = task_named(folder.task), folder.preprocessing.size

    def look(runner: Runner, call: Call, advance: Advance) -> WitnessReport:
        witness, outputs = observed(runner, folder.artifact, folder.path, inputs, advance, call)
        return testimony(runner, witness, outputs, golden.references, task, folder.precision, size)

    seen = _heard(able, look, f"run {len(golden.images)} golden images", progress, limits)
    if checkpoint is None:
        return Recheck(folder, saved, claims, seen, absent)
    again = rebuilt(folder, Path(checkpoint), progress)
    ladder = again.ladder
    if folder.precision is Precision.INT8:
        ladder = in_saved_8_bits(ladder, saved.document["int8"])

    def compare(runner: Runner, call: Call, advance: Advance) -> WitnessReport:
        return witnessed(runner, folder.artifact, folder.path, ladder, folder.precision, advance, call)

    lowered, wrong = _built_again(target, folder, again.card, ladder, progress, limits)
    claims = replace(claims, contradictions=(*claims.contradictions, *wrong))
    reports = _heard(able, compare, "verify against the checkpoint", progress, limits)
    parity = parity_report(ladder, folder.precision, reports, lowered)
    return Recheck(folder, saved, claims, seen, absent, ladder, parity)


def _built_again(
    target: Target, folder: Folder, card: ModelCard, ladder: Ladder, progress: Progress, limits: Limits
) -> tuple[Rung | None, tuple[str, ...]]:
    """What the target's rewrites change, judged again, and what is wrong about the weights in 8 bits; None and nothing
    where its toolchain is not here. Raises ExportError."""
    if target.missing() is not None:
        return None, ()
    levels = ladder.in_8_bits.quantisation if ladder.in_8_bits else None
    batch = max(1, folder.artifact.inputs[0].shape[0])
    network = network_for(card, ladder.folded, batch, quantisation=levels)
    asked = {name: value for name, value in folder.manifest["options"].items() if value is not None}
    with progress.stage(f"{target.name}: lower the network again"), Worker(limits) as worker:
        lowered = lowered_rung(target, network, options_for(target, asked), ladder, worker.call)
        wrong = worker.call(f"{target.name}: read back the weights", misheld, target, folder.path, network)
    return lowered, wrong


def _able(target: Target, folder: Folder, on: Sequence[str]) -> tuple[tuple[Runner, ...], tuple[Absent, ...]]:
    """Who can run the folder's artefact here, and who cannot. One that was named and is missing is an error."""
    able, absent = [], []
    for runner in chosen(target, folder.precision, on):
        missing = runner.missing() or unfit(runner, folder.artifact)
        if missing is None:
            able.append(runner)
        elif ALL in on:
            absent.append(Absent(runner.name, missing))
        else:
            raise TargetUnavailableError(missing.reason, hint=missing.fix)
    if not able:
        names = ", ".join(runners_of(target))
        raise TargetUnavailableError(
            f"none of those named runs '{folder.path}', an artefact of target '{target.name}'",
            hint=f"name one of: {names}",
        )
    return tuple(able), tuple(absent)


def _heard(
    runners: Sequence[Runner],
    look: Callable[[Runner, Call, Advance], WitnessReport],
    title: str,
    progress: Progress,
    limits: Limits,
) -> tuple[WitnessReport, ...]:
    """Every runner's report, each from a process of its own. One that does not survive has that for its report."""
    reports = []
    for runner in runners:
        try:
            with progress.stage(f"{runner.name}: {title}") as advance, Worker(limits) as worker:
                reports.append(look(runner, worker.call, advance))
        except ExportError as error:
            how = error.how if isinstance(error, CrashError) else "error"
            reports.append(WitnessReport(runner.witness(), (), None, failure=Failure(how, str(error))))
    return tuple(reports)


def benchmark(path: str | Path, *, threads: int = 1) -> Timing:
    """Latency of an artefact folder on its first golden images. Raises TargetUnavailableError where it cannot run."""
    folder = read_folder(Path(path))
    target = _target_of(folder)
    if not timed(target.witness()):
        raise TargetUnavailableError(
            f"{target.witness().name} runs '{path}' here, and its time says nothing of the device",
            hint="run castling bench where the target's own runtime is",
        )
    (spec,) = folder.artifact.inputs
    probes = Probes.of(read_golden(folder).images, folder.preprocessing)
    batch = spec.shape[0] if spec.shape[0] > 0 else 1
    feed = repeated(inputs_for(spec, probes), batch)
    with opened(target, folder.path, threads) as session:
        return interleaved({session.witness.name: lambda: session({spec.name: feed})})[session.witness.name]


def _target_of(folder: Folder) -> Target:
    target = target_named(folder.target)
    missing = target.missing()
    if missing is not None:
        raise TargetUnavailableError(missing.reason, hint=missing.fix)
    return target
