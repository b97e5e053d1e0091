"""The reference of an artefact folder, computed again from the checkpoint that it was exported from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from castling_deploy import bundled
from castling_deploy.artifact import Folder
from castling_deploy.checkpoint import read
from castling_deploy.errors import ParityError, UsageError
from castling_deploy.folder import sha256
from castling_deploy.identify import ModelCard, identify
from castling_deploy.ladder import Ladder, climb
from castling_deploy.models.family import family_named
from castling_deploy.probes import probes_for
from castling_deploy.progress import Progress
from castling_deploy.reading.card import Told
from castling_deploy.task import task_named


@dataclass(frozen=True)
class Rebuilt:
    """What the checkpoint is, and its ladder."""

    card: ModelCard
    ladder: Ladder


def rebuilt(folder: Folder, checkpoint: Path, progress: Progress) -> Rebuilt:
    """Read, cast, folded and run as at the export. Raises ParityError where it is another checkpoint."""
    with progress.stage("read the checkpoint and run the reference") as advance:
        made, read_as = folder.manifest["model"], folder.manifest["checkpoint"]
        told = Told.of(read_as.get("told", {}))
        is_baseline = made["config"].get("attention") == "softmax"
        network, card = identify(
            read(checkpoint, told.weights),
            model=family_named(made["family"]).baseline if is_baseline else None,
            image_size=folder.preprocessing.size,
            init_dconv=read_as.get("init_dconv"),
            told=told,
        )
        if card.checkpoint_sha256 != folder.checkpoint_sha256:
            raise ParityError(
                f"'{checkpoint}' is not the checkpoint that '{folder.path}' was exported from",
                hint="name the file whose SHA-256 is in the manifest, or export again",
            )
        probes = probes_for(folder.preprocessing, card.samples).affordable(card.output_values)
        return Rebuilt(card, climb(network, task_named(card.task), card.outputs, probes, advance))


def checkpoint_of(folder: Folder) -> Path:
    """The file that the folder was exported from, where it is still there or bundled. Raises UsageError."""
    written = folder.manifest["checkpoint"].get("path")
    candidates = [Path(written)] if written else []
    for path in (*candidates, *map(bundled.checkpoint_path, bundled.CHECKPOINTS)):
        if path.is_file() and sha256(path) == folder.checkpoint_sha256:
            return path
    raise UsageError(
        f"the checkpoint that '{folder.path}' was exported from is not here", hint="name it with --checkpoint"
    )
