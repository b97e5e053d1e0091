"""The facts that travel inside an artefact's file, in the words of its manifest, which has to agree with them.

An exporter writes them (`stating`), `attest` reads them back, and `rechecking.claims` makes them again from a manifest.
All are texts: formats hold nothing else. What one machine computes a little differently from another (noise, golden
outputs) is none of them, so that a network is the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from castling_deploy.plain import plain
from castling_deploy.target import Artifact, Network, Precision

OF_MODEL = ("family", "task", "reference", "image_size", "classes", "config")  # keys of the manifest's "model"
WIDE = ("islands", "wide_reductions")  # keys of its "details", which are no exporter's


def fact(value: Any) -> str:
    """A text as it is, anything else as JSON with sorted keys."""
    return value if isinstance(value, str) else json.dumps(plain(value), sort_keys=True)


def network_facts(
    model: Mapping[str, Any], checkpoint_sha256: str | None, tool: str | None, preprocessing: Any, labels: Any
) -> dict[str, str]:
    """What a file says of the network in it; `model` is the manifest's, `tool` the version of castling-deploy."""
    told = {
        "model": model.get("name"),
        **{name: model.get(name) for name in OF_MODEL},
        "checkpoint_sha256": checkpoint_sha256 or "none",
        "castling_deploy": tool,
        "preprocessing": preprocessing,
        "labels": labels,
    }
    return {name: fact(value) for name, value in told.items()}


def artifact_facts(
    target: str, precision: Precision, options: Any, wide: Mapping[str, Any], artifact: Artifact
) -> dict[str, str]:
    """What a file says of itself; `wide` has what stays in float32, by the keys `WIDE`."""
    told = {
        "target": target,
        "precision": precision,
        "options": options,
        **{name: wide.get(name) for name in WIDE},
        "interface": {"inputs": artifact.inputs, "outputs": artifact.outputs},
    }
    return {name: fact(value) for name, value in told.items()}


def stating(network: Network, target: str, precision: Precision, options: Any, artifact: Artifact) -> Network:
    """The network with the facts of the artefact that it is about to become beside its own."""
    wide = dict(zip(WIDE, (network.islands, network.reductions), strict=True))
    own = artifact_facts(target, precision, options, wide, artifact)
    made = {"tools": fact(artifact.tools), "usage_sha256": digest(artifact.usage)}
    return replace(network, metadata={**network.metadata, **own, **made})


def digest(text: str) -> str:
    """The SHA-256 of a text, without the white space around it."""
    return hashlib.sha256(text.strip().encode()).hexdigest()
