"""What stands in an artefact folder beside the model: manifest, parity, latency, golden images, README."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from castling_deploy import contract, documents
from castling_deploy.eight_bits import Quantisation
from castling_deploy.errors import UsageError
from castling_deploy.facts import network_facts
from castling_deploy.folder import MANIFEST, files_in, sha256
from castling_deploy.identify import ModelCard
from castling_deploy.ladder import Ladder
from castling_deploy.latency import LatencyReport
from castling_deploy.models.family import family_named
from castling_deploy.parity import TOLERANCES, ParityReport, Reference, Verdict
from castling_deploy.plain import SCHEMA, plain
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.range_audit import Audit
from castling_deploy.readme import readme
from castling_deploy.selftests.facts import GoldenOutput, facts_of, golden_document, golden_output
from castling_deploy.selftests.texts import texts
from castling_deploy.target import Artifact, Missing, Network, Precision, Target, TensorSpec

SEAL = "manifest_sha256"  # the manifest's key for the hash of all its others
GOLDEN_IMAGES = 8  # real ones
GOLDEN_STRUCTURED = 4
GOLDEN_BYTES = 2**26  # of their outputs
LEAST_GOLDEN = 2  # images: without two there is no spread to measure an error against


def network_for(
    card: ModelCard,
    folded: nn.Module,
    batch_size: int,
    audit: Audit | None = None,
    quantisation: Quantisation | None = None,
) -> Network:
    """What the exporters are handed: the folded network with its interface and the facts that travel inside a file.

    `audit` is for float16, and tells them what has to stay in float32; `quantisation` is for int8. Raises ParityError
    where all of it has to stay in float32.
    """
    height, width = card.config.image_size
    return Network(
        name=card.name,
        module=folded,
        inputs=(TensorSpec("image", (batch_size, card.config.channels, height, width), "float32", "NCHW"),),
        outputs=tuple(
            TensorSpec(output.name, (batch_size, *output.shape), "float32", "N" + output.layout)
            for output in family_named(card.family).outputs(card.config)
        ),
        preprocessing=card.preprocessing,
        labels=card.labels,
        description=f"{card.name}: a {card.family} network ({card.reference}), auxiliary branch cast away, "
        "BatchNorm folded",
        metadata=network_facts(
            documents.network_document(card),
            card.checkpoint_sha256,
            version("castling-deploy"),
            card.preprocessing,
            card.labels,
        ),
        islands=audit.module_paths() if audit else (),
        reductions=audit.reduction_paths() if audit else (),
        quantisation=quantisation,
    )


def version(package: str) -> str:
    """The installed version of a package."""
    return metadata.version(package)


def describe(
    folder: Path,
    card: ModelCard,
    ladder: Ladder,
    target: Target,
    precision: Precision,
    options: Any,
    artifact: Artifact,
    parity: ParityReport,
    latency: LatencyReport | None,
) -> None:
    """Write everything beside the model into `folder`; the manifest, which holds every file's hash, last."""
    real, golden = _write_golden(folder, card, ladder, precision)
    facts = facts_of(artifact, card.preprocessing, golden)
    (folder / "selftest").mkdir()
    for name, text in texts(target.selftests, facts).items():
        (folder / "selftest" / name).write_text(text, encoding="utf-8")
    documents.write(folder / "parity.json", documents.parity_document(parity, ladder))
    if latency is not None:
        documents.write(folder / "latency.json", documents.latency_document(latency))
    told = readme(card.name, card.warnings, target, precision, card.preprocessing, artifact, parity)
    (folder / "README.md").write_text(told.around(artifact.usage), encoding="utf-8")
    documents.write(
        folder / MANIFEST,
        sealed(
            {
                "schema": SCHEMA,
                "model": documents.model_document(card, ladder.parameters),
                "checkpoint": documents.checkpoint_document(card),
                "target": target.name,
                "precision": precision,
                "options": options,
                "parity": parity.verdict,
                "noise_rel": {name: reference.noise for name, reference in ladder.expected.items()},
                "inputs": artifact.inputs,
                "outputs": artifact.outputs,
                "preprocessing": card.preprocessing,
                "preprocessing_steps": contract.steps(card.preprocessing, artifact.inputs[0]),
                "golden": golden_document(golden, real),
                "labels": card.labels,
                "loads_with": artifact.loads_with,
                "details": artifact.details,
                "unfinished": artifact.unfinished,
                "tools": {**artifact.tools, "torch": torch.__version__, "castling-deploy": version("castling-deploy")},
                "model_files": artifact.files,
                "files": {path.as_posix(): sha256(folder / path) for path in files_in(folder)},
            }
        ),
    )


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of itself, so that a hand that edits it is seen: no seal against forgers."""
    document: dict[str, Any] = plain({key: value for key, value in manifest.items() if key != SEAL})
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return {**document, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _write_golden(
    folder: Path, card: ModelCard, ladder: Ladder, precision: Precision
) -> tuple[int, tuple[GoldenOutput, ...]]:
    """Images and what the reference says of them into golden/; how an error on them is judged.

    Real ones first (it returns how many), then some of the flat, saturated and striped ones: a wrong epsilon or clamp
    shows on these alone.
    """
    golden = folder / "golden"
    golden.mkdir()
    affordable = GOLDEN_BYTES // (4 * card.output_values)
    count = min(ladder.probes.real, max(LEAST_GOLDEN, min(GOLDEN_IMAGES, affordable)))
    probes = ladder.probes
    structured = range(probes.real, len(probes.images))
    few = list(structured)[:: max(1, len(structured) // GOLDEN_STRUCTURED)][:GOLDEN_STRUCTURED]
    rows = [*range(count), *(few if affordable >= GOLDEN_IMAGES + len(few) else [])]
    np.save(golden / "images.npy", probes.images[rows])
    judged = []
    for name, reference in ladder.expected.items():
        kept = Reference(reference.outputs[rows], count, reference.noise)
        np.save(golden / f"{name}.npy", kept.outputs)
        judged.append(golden_output(kept, name, TOLERANCES[precision]))
    return count, tuple(judged)


@dataclass(frozen=True)
class Folder:
    """An artefact folder that was read back, and its manifest as it stands on disk; `verdict` is that of its export."""

    path: Path
    manifest: Mapping[str, Any]
    target: str
    precision: Precision
    verdict: Verdict
    artifact: Artifact
    preprocessing: Preprocessing
    task: str
    noise: Mapping[str, float]
    checkpoint_sha256: str | None
    files: Mapping[str, str]

    @property
    def golden_real(self) -> int:
        """How many of the golden images are real ones, by which the spread is measured."""
        return int(self.manifest["golden"]["real"])

    def changed(self) -> tuple[str, ...]:
        """Files that are missing, were changed after the export, or were added to the model."""
        found = {path.as_posix() for path in files_in(self.path)} - {MANIFEST}
        changed = [
            name for name, digest in self.files.items() if name not in found or sha256(self.path / name) != digest
        ]
        if self.manifest.get(SEAL) != sealed(self.manifest)[SEAL]:
            changed.append(MANIFEST)
        return tuple(sorted([*changed, *(found - self.files.keys())]))


def read_folder(path: Path) -> Folder:
    """The artefact at `path`. Raises UsageError when it is none, or was written by a newer castling-deploy."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{path}' is no artefact folder: its {MANIFEST} cannot be read ({error})",
            hint="name a folder that `castling export` wrote",
        ) from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise UsageError(
            f"the {MANIFEST} of '{path}' names no 'schema': it is empty, or is not what `castling export` wrote",
            hint=f"put the {MANIFEST} of the export back, or export the artefact again",
        )
    if manifest["schema"] != SCHEMA:
        raise UsageError(
            f"'{path}' has a manifest of schema {manifest['schema']!r}, this version reads schema {SCHEMA}",
            hint="use the castling-deploy that wrote it",
        )
    try:
        artifact = Artifact(
            files=tuple(manifest["model_files"]),
            inputs=_specs(manifest["inputs"]),
            outputs=_specs(manifest["outputs"]),
            tools=dict(manifest["tools"]),
            loads_with=tuple(manifest["loads_with"]),
            usage="",
            details=dict(manifest["details"]),
            unfinished=None if manifest["unfinished"] is None else Missing(**manifest["unfinished"]),
        )
        precision = Precision(manifest["precision"])
        if precision not in TOLERANCES:
            raise ValueError(f"nothing is built in {precision}")
        if int(manifest["golden"]["real"]) < 1 or not manifest["noise_rel"] or not artifact.files:
            raise ValueError("it names no output, no golden image, or no file of the model")
        preprocessing: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in manifest["preprocessing"].items()
        }
        return Folder(
            path,
            manifest,
            str(manifest["target"]),
            precision,
            Verdict(manifest["parity"]),
            artifact,
            Preprocessing(**preprocessing),
            str(manifest["model"]["task"]),
            {str(name): float(noise) for name, noise in manifest["noise_rel"].items()},
            manifest["checkpoint"]["sha256"],
            dict(manifest["files"]),
        )
    except KeyError as error:
        raise UsageError(
            f"the manifest of '{path}' is damaged: it lacks {error}", hint="export the artefact again"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"the manifest of '{path}' is damaged: {type(error).__name__}: {error}", hint="export the artefact again"
        ) from None


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in items)
