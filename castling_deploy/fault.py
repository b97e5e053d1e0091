"""Where an artefact on disk goes wrong: `localise` for a folder, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from castling_deploy.artifact import network_for, read_folder
from castling_deploy.isolation import Limits, isolated
from castling_deploy.localise import Localisation, localise
from castling_deploy.probes import Probes
from castling_deploy.progress import Advance, Progress
from castling_deploy.rebuilt import checkpoint_of, rebuilt
from castling_deploy.target import Artifact, Network, Precision, Target, options_for, target_named


def find_fault(path: Path, checkpoint: Path | None, progress: Progress, limits: Limits) -> Localisation:
    """The first module of an artefact folder that goes wrong; what reproduces it goes into `<path>-localised`.

    The folder may have been changed since its export. Raises UsageError where its checkpoint is not here.
    """
    folder = read_folder(path)
    target = target_named(folder.target)
    seen = rebuilt(folder, checkpoint or checkpoint_of(folder), progress)
    options = {name: value for name, value in folder.manifest["options"].items() if value is not None}
    network = network_for(seen.card, seen.ladder.folded, max(1, folder.artifact.inputs[0].shape[0]))
    return isolated_fault(
        target,
        network,
        folder.precision,
        options_for(target, options),
        seen.ladder.probes,
        (folder.artifact, path),
        progress,
        limits,
    )


def isolated_fault(
    target: Target,
    network: Network,
    precision: Precision,
    options: Any,
    probes: Probes,
    suspect: tuple[Artifact, Path],
    progress: Progress,
    limits: Limits,
) -> Localisation:
    """`localise` in a process of its own; `suspect` is an artefact and its folder."""
    _, path = suspect
    into = path.with_name(f"{path.name}-localised")
    with progress.stage(f"{target.name}: export ever shorter prefixes, to find what goes wrong") as advance:
        return isolated(
            f"{target.name}: localise",
            _localise,
            target,
            network,
            precision,
            options,
            probes,
            suspect,
            into,
            advance=advance,
            limits=limits,
        )


def _localise(
    target: Target,
    network: Network,
    precision: Precision,
    options: Any,
    probes: Probes,
    suspect: tuple[Artifact, Path],
    into: Path,
    advance: Advance,
) -> Localisation:
    return localise(target, network, precision, options, probes, folder=into, suspect=suspect)
