"""Checking and timing an artefact folder after its export, on this machine or another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from castling_deploy.artifact import Folder, read_folder
from castling_deploy.checkpoint import read
from castling_deploy.errors import ParityError, TargetUnavailableError, UsageError
from castling_deploy.execution import inputs_for, repeated, run_artifact
from castling_deploy.identify import identify
from castling_deploy.ladder import Ladder, climb
from castling_deploy.latency import TIMED, Timing, interleaved
from castling_deploy.models.family import family_named
from castling_deploy.parity import TOLERANCES, Array, ParityReport, Reference, Verdict, WitnessReport
from castling_deploy.probes import Probes, probes_for
from castling_deploy.progress import Progress, Silent
from castling_deploy.target import Target, target_named
from castling_deploy.task import task_named
from castling_deploy.verification import compared, opened, verify_artifact


@dataclass(frozen=True)
class Recheck:
    """What a second look at a folder found: against its golden outputs, and against the checkpoint if it was named."""

    folder: Folder
    golden: WitnessReport
    ladder: Ladder | None = None
    parity: ParityReport | None = None

    @property
    def verdict(self) -> Verdict:
        """The golden images are few: without a new comparison, the verdict of the export counts beside theirs."""
        return Verdict.worst([self.golden.verdict, self.parity.verdict if self.parity else self.folder.verdict])


def verify(path: str | Path, checkpoint: str | Path | None = None, progress: Progress | None = None) -> Recheck:
    """Hashes, golden outputs, and with `checkpoint` the whole comparison again.

    Raises ParityError when a file was changed after the export, or the checkpoint is another one; UsageError when the
    folder is no artefact; TargetUnavailableError when its runtime is not installed here.
    """
    progress = progress or Silent()
    with progress.stage("check the files against the manifest"):
        folder = read_folder(Path(path))
        changed = folder.changed()
        if changed:
            raise ParityError(
                f"'{path}' is not as it was exported; changed, missing or added: {', '.join(changed)}",
                hint="export it again; a changed artefact has not been verified",
            )
    target = _target_of(folder)
    images, golden_outputs = _golden(folder)
    probes = Probes.of(images, folder.preprocessing)
    with progress.stage(f"{target.name}: run the golden images") as advance, opened(target, folder.path) as session:
        outputs = run_artifact(session, folder.artifact, inputs_for(folder.artifact.inputs[0], probes), advance)
        witness = session.witness
    references = {
        name: Reference(values, real=len(values), noise=folder.noise[name]) for name, values in golden_outputs.items()
    }
    task = task_named(folder.task)
    parities = compared(task, outputs, references, TOLERANCES[folder.precision], folder.preprocessing.size)
    golden = WitnessReport(witness, parities, None)
    if checkpoint is None:
        return Recheck(folder, golden)
    ladder = _ladder(folder, Path(checkpoint), progress)
    with progress.stage(f"{target.name}: verify against the checkpoint") as advance:
        parity = verify_artifact(target, folder.artifact, folder.path, ladder, folder.precision, advance)
    return Recheck(folder, golden, ladder, parity)


def benchmark(path: str | Path, *, threads: int = 1) -> Timing:
    """Latency of an artefact folder on its first golden images. Raises TargetUnavailableError where it cannot run."""
    folder = read_folder(Path(path))
    target = _target_of(folder)
    if target.witness().kind not in TIMED:
        raise TargetUnavailableError(
            f"{target.witness().name} runs '{path}' here, and its time says nothing of the device",
            hint="run castling bench where the target's own runtime is",
        )
    images, _ = _golden(folder)
    (spec,) = folder.artifact.inputs
    probes = Probes.of(images, folder.preprocessing)
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


def _golden(folder: Folder) -> tuple[npt.NDArray[np.uint8], dict[str, Array]]:
    """The golden images, and what the reference says of them, output by output."""
    golden = folder.path / "golden"
    try:
        images = np.load(golden / "images.npy", allow_pickle=False)
        return images, {name: np.load(golden / f"{name}.npy", allow_pickle=False) for name in folder.noise}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the golden images of '{folder.path}' cannot be read: {error}", hint="export the artefact again"
        ) from None


def _ladder(folder: Folder, checkpoint: Path, progress: Progress) -> Ladder:
    with progress.stage("read the checkpoint and run the reference") as advance:
        made, init_dconv = folder.manifest["model"], folder.manifest["checkpoint"].get("init_dconv")
        is_baseline = made["config"].get("attention") == "softmax"
        network, card = identify(
            read(checkpoint),
            model=family_named(made["family"]).baseline if is_baseline else None,
            image_size=folder.preprocessing.size,
            init_dconv=init_dconv,
        )
        if card.checkpoint_sha256 != folder.checkpoint_sha256:
            raise ParityError(
                f"'{checkpoint}' is not the checkpoint that '{folder.path}' was exported from",
                hint="name the file whose SHA-256 is in the manifest, or export again",
            )
        probes = probes_for(folder.preprocessing, card.samples).affordable(card.output_values)
        return climb(network, task_named(card.task), card.outputs, probes, advance)
