"""Where an artefact on disk goes wrong: `localise` for a folder, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from castling_deploy.artifact import network_for, read_folder
from castling_deploy.isolation import Limits, isolated
from castling_deploy.localising.localisation import Localisation
from castling_deploy.localising.localise import localise, refuse
from castling_deploy.localising.rebuilt import checkpoint_of, rebuilt
from castling_deploy.probes import Probes
from castling_deploy.progress import Advance, Progress
from castling_deploy.target import Artifact, Network, Precision, Target, options_for, target_named


def find_fault(path: Path, checkpoint: Path | None, progress: Progress, limits: Limits) -> Localisation:
    """The first module of an artefact folder that goes wrong; what reproduces it goes into `<path>-localised`.

    The folder may have been changed since its export. Raises UsageError where its checkpoint is not here, and for a
    precision that this finds nothing in.
    """
    folder = read_folder(path)
    refuse(folder.precision)
    target = target_named(folder.target)
    seen = rebuilt(folder, checkpoint or checkpoint_of(folder), progress)
    options = {name: value for name, value in folder.manifest["options"].items() if value is not None}
    details = folder.artifact.details
    network = replace(
        network_for(seen.card, seen.ladder.folded, max(1, folder.artifact.inputs[0].shape[0])),
        islands=tuple(details.get("islands", ())),
        reductions=tuple(details.get("wide_reductions", ())),
    )
    suspect = Suspect(target, network, folder.precision, options_for(target, options), folder.artifact, path)
    return isolated_fault(suspect, seen.ladder.probes, progress, limits)


@dataclass(frozen=True)
class Suspect:
    """An artefact in the folder `path`, and what it was exported from; `fresh`: by this process, and just now."""

    target: Target
    network: Network
    precision: Precision
    options: Any
    artifact: Artifact
    path: Path
    fresh: bool = False


def isolated_fault(suspect: Suspect, probes: Probes, progress: Progress, limits: Limits) -> Localisation:
    """`localise` in a process of its own."""
    name = suspect.target.name
    with progress.stage(f"{name}: export ever shorter prefixes, to find what goes wrong") as advance:
        return isolated(f"{name}: localise", _localise, suspect, probes, advance=advance, limits=limits)


def _localise(suspect: Suspect, probes: Probes, advance: Advance) -> Localisation:
    path = suspect.path
    return localise(
        suspect.target,
        suspect.network,
        suspect.precision,
        suspect.options,
        probes,
        folder=path.with_name(f"{path.name}-localised"),
        suspect=(suspect.artifact, path),
        fresh=suspect.fresh,
    )
