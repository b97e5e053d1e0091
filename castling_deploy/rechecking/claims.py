"""What a manifest claims, held against what the artefact's own files say: their types, and the facts inside them.

A file that was relabelled, or exchanged with a hash that fits, contradicts itself here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from castling_deploy import contract
from castling_deploy.artifact import Folder
from castling_deploy.isolation import Limits, isolated
from castling_deploy.plain import plain
from castling_deploy.quiet import toolchain
from castling_deploy.rechecking.saved import PARITY, read_parity, unfounded
from castling_deploy.target import Attestation, Missing, Target


@dataclass(frozen=True)
class Claims:
    """What the files attest, and where it contradicts the manifest; or why they could not be read here."""

    attestation: Attestation | None
    contradictions: tuple[str, ...] = ()
    missing: Missing | None = None


def examined(target: Target, folder: Folder, limits: Limits) -> Claims:
    """The folder's files, read back in a process of their own. Raises ExportError for files that cannot be read."""
    missing = target.missing()
    if missing is not None:
        return Claims(None, missing=missing)
    found = isolated(f"{target.name}: read back what was built", _attest, target, folder, limits=limits)
    wrong = (*found.problems, *_contradictions(folder.manifest, found.facts), *_inconsistencies(folder))
    return Claims(found, wrong)


def _attest(target: Target, folder: Folder) -> Attestation:
    with toolchain(f"{target.name}: the artefact cannot be read"):
        return target.attest(folder.path, folder.artifact, folder.precision)


def _inconsistencies(folder: Folder) -> Iterator[str]:
    """What the manifest says twice, and not alike."""
    manifest, (spec,) = folder.manifest, folder.artifact.inputs
    if manifest["preprocessing_steps"] != plain(contract.steps(folder.preprocessing, spec)):
        yield "the manifest's preprocessing_steps are not those of its preprocessing"
    for name in folder.artifact.files:
        if not any(file == name or file.startswith(f"{name}/") for file in folder.files):
            yield f"the manifest's model_files name {name}, which is none of its files"
    saved = read_parity(folder.path / PARITY).report
    yield from (f"parity.json: {reason}" for reason in unfounded(saved, folder.precision))


def _contradictions(manifest: Mapping[str, Any], facts: Mapping[str, str]) -> Iterator[str]:
    """Facts that the files state otherwise, or not any more."""
    claimed = {
        "model": manifest["model"]["name"],
        "checkpoint_sha256": manifest["checkpoint"]["sha256"] or "none",
        "preprocessing": plain(manifest["preprocessing"]),
        "labels": manifest["labels"],
    }
    for name, claim in claimed.items():
        if name not in facts:
            yield f"the model's file does not state its {name} any more"
        elif (json.loads(facts[name]) if name in ("preprocessing", "labels") else facts[name]) != claim:
            yield f"the manifest's {name} is not the one that stands in the model's file"
