"""What a manifest claims, held against what the artefact's own files say: their types, and the facts inside them.

A file that was relabelled, or exchanged with a hash that fits, contradicts itself here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from castling_deploy import contract
from castling_deploy.artifact import Folder, version
from castling_deploy.errors import CrashError, ExportError, UsageError
from castling_deploy.facts import artifact_facts, network_facts
from castling_deploy.isolation import Limits, isolated
from castling_deploy.plain import plain
from castling_deploy.quiet import toolchain
from castling_deploy.rechecking.golden import Golden, judged_by, unfounded_golden
from castling_deploy.rechecking.saved import SavedParity, unfounded
from castling_deploy.rechecking.texts import altered
from castling_deploy.target import Attestation, Missing, Target

TOOL = "castling-deploy"


@dataclass(frozen=True)
class Claims:
    """What the files attest, and where it contradicts the manifest; or why they could not be read here.

    `not_compared` says why the texts beside the model were not written once more.
    """

    attestation: Attestation | None
    contradictions: tuple[str, ...] = ()
    missing: Missing | None = None
    not_compared: str | None = None


def read_back(target: Target, folder: Folder, limits: Limits) -> Claims:
    """What the model's files say against the manifest, read in a process of their own.

    Raises UsageError for files that cannot be read, CrashError where reading them does not end well.
    """
    misnamed = tuple(_misnamed(target, folder))
    if misnamed:
        return Claims(None, misnamed)
    missing = target.missing()
    if missing is not None:
        return Claims(None, missing=missing)
    try:
        found = isolated(f"{target.name}: read back what was built", _attest, target, folder, limits=limits)
    except CrashError:
        raise
    except ExportError as error:
        raise UsageError(error.message, hint=error.hint or "export the artefact again") from error
    return Claims(found, (*found.problems, *_contradictions(folder, found.facts)))


def coherent(claims: Claims, target: Target, folder: Folder, golden: Golden, saved: SavedParity) -> Claims:
    """`claims`, with what the folder says twice and not alike."""
    wrong = (*claims.contradictions, *_inconsistencies(folder, saved), *unfounded_golden(golden, folder, saved.report))
    wrote = folder.artifact.tools.get(TOOL)
    if claims.attestation is None:
        said = "the model's file was not read back, and holds the hash of a part of them"
    elif wrote != version(TOOL):
        said = f"{TOOL} {wrote} wrote them, and this is {version(TOOL)}"
    else:
        texts = altered(folder, target, judged_by(golden, folder), saved.report, claims.attestation.facts)
        return Claims(claims.attestation, tuple(dict.fromkeys((*wrong, *texts))))
    return Claims(claims.attestation, tuple(dict.fromkeys(wrong)), claims.missing, said)


def _attest(target: Target, folder: Folder) -> Attestation:
    with toolchain(f"{target.name}: the artefact cannot be read"):
        return target.attest(folder.path, folder.artifact, folder.precision)


def _misnamed(target: Target, folder: Folder) -> Iterator[str]:
    """Files of the model that this target does not write, or that are not there."""
    if target.file not in folder.artifact.files:
        yield f"{target.name} is claimed, which writes {target.file}, and the manifest's model_files do not name it"
    for name in folder.artifact.files:
        if not any(file == name or file.startswith(f"{name}/") for file in folder.files):
            yield f"the manifest's model_files name {name}, which is none of its files"


def _contradictions(folder: Folder, facts: Mapping[str, str]) -> Iterator[str]:
    """Facts that the files state otherwise, or not any more."""
    manifest, artifact = folder.manifest, folder.artifact
    tool = artifact.tools.get(TOOL)
    claimed = {
        **network_facts(
            manifest["model"], folder.checkpoint_sha256, tool, manifest["preprocessing"], manifest.get("labels")
        ),
        **artifact_facts(folder.target, folder.precision, manifest.get("options"), artifact.details, artifact),
    }
    for name, claim in claimed.items():
        if name not in facts:
            yield f"the model's file does not state its {name} any more"
        elif facts[name] != claim:
            yield f"the manifest's {name} is not the one that stands in the model's file"
    for name, written in json.loads(facts.get("tools", "{}")).items():
        if artifact.tools.get(name) != written:
            yield f"the manifest's tools have {name} {artifact.tools.get(name)}, and {written} wrote the model's file"


def _inconsistencies(folder: Folder, saved: SavedParity) -> Iterator[str]:
    """What the manifest says of itself or of parity.json, and is not so."""
    manifest, (spec,) = folder.manifest, folder.artifact.inputs
    if manifest.get("preprocessing_steps") != plain(contract.steps(folder.preprocessing, spec)):
        yield "the manifest's preprocessing_steps are not those of its preprocessing"
    if folder.verdict is not saved.verdict:
        yield f"the manifest's parity is {folder.verdict}, and that of parity.json {saved.verdict}"
    yield from (f"parity.json: {reason}" for reason in unfounded(saved, folder.precision))
