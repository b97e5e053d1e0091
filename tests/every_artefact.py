"""The main job on the trained networks: what `castling export` has to make of each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from deployments import Run

from castling_deploy import bundled
from castling_deploy.target import TARGETS, Precision, images_for, target_named

# Every precision of every target, on both bundled networks: (network, target, precision).
EVERYTHING = [
    (network, name, precision.value)
    for network in bundled.CHECKPOINTS
    for name in TARGETS
    for precision in target_named(name).precisions
]
# Always: the default network in float32 to every target and in float16 where that is quick, the others in float32 to
# ONNX. All of them to all takes half an hour; int8 has a file of its own.
QUICK_IN_HALF = ("onnx", "tensorrt", "coreml")
SLOW = [
    (network, target, precision)
    for network, target, precision in EVERYTHING
    if not (
        (network == bundled.DEFAULT and (precision == "fp32" or (precision == "fp16" and target in QUICK_IN_HALF)))
        or (target, precision) == ("onnx", "fp32")
    )
]
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 3e-2}
# Metric, what the trained network reaches, and by how much an artefact may differ in fp32 and in fp16, all in percent:
# no image and one of 360; boxes and pixels that lie on the edge of a threshold.
SCORES = {
    "classification": ("top-1", 97, 0, 0.3),
    "detection": ("mAP", 75, 0.05, 0.5),
    "segmentation": ("mIoU", 75, 0.01, 0.1),
}
MAX_DROP = 0.5  # of int8, by default
Deployed = Callable[..., Run]


def combinations(*networks: str) -> list[Any]:
    """Parameters (network, target, precision)."""
    return [
        pytest.param(*each, marks=pytest.mark.slow if each in SLOW else ())
        for each in EVERYTHING
        if each[0] in networks
    ]


def artifact_of(run: Run, target: str) -> dict[str, Any]:
    (artifact,) = (artifact for artifact in run.document["artifacts"] if artifact["target"] == target)
    return artifact  # type: ignore[no-any-return]


def computes_what_pytorch_computes(network: str, target: str, precision: str, deployed: Deployed) -> None:
    run = deployed(network, precision, (network, target, precision) in SLOW)
    artifact = artifact_of(run, target)
    parity = artifact["parity"]
    limit = LIMITS[precision]
    assert parity["verdict"] == "pass", run.err
    assert parity["power"] >= 0.95
    quantised = ["quantised"] if precision == "int8" else []
    assert [rung["name"] for rung in parity["rungs"]] == ["cast", "fold", *quantised, "lowered", "exported"]
    assert all(rung["verdict"] == "pass" for rung in parity["rungs"])
    assert parity["rungs"][1]["rel"] < 1e-12
    witness = parity["witnesses"][0]
    for output in (output for seen in parity["witnesses"] for output in seen["outputs"]):
        assert output["rel"] <= limit and output["top1_agreement"] in (1, None)
    metric, least, fp32_differs, fp16_differs = SCORES[run.document["model"]["task"]]
    assert parity["accuracy"]["metric"] == metric
    assert parity["accuracy"]["trained"] >= least
    assert parity["accuracy"]["trained"] - parity["accuracy"]["reference"] <= 0.5
    affordable = images_for(target_named(target), Precision(precision))
    if affordable is not None:
        assert affordable < parity["probes"] < 2 * affordable + 5 and witness["accuracy"] is None
        return
    differs = abs(witness["accuracy"] - parity["accuracy"]["reference"])
    assert differs <= {"fp32": fp32_differs, "fp16": fp16_differs, "int8": MAX_DROP + fp16_differs}[precision]


def has_the_promised_keys(network: str, deployed: Deployed) -> None:
    document = deployed(network, "fp32").document
    assert list(document) == ["schema", "checkpoint", "model", "cast", "fold", "artifacts"]
    assert document["model"]["name"] == network and len(document["checkpoint"]["sha256"]) == 64
    assert document["cast"]["layers"][0].keys() >= {"path", "mask_density", "contribution", "can_vanish", "tokens"}
    assert sum(document["fold"]["rules"].values()) == len(document["fold"]["steps"]) > 0
    for artifact in document["artifacts"]:
        assert artifact.keys() >= {
            "target",
            "precision",
            "path",
            "files",
            "bytes",
            "parity",
            "latency",
            "status",
            "reason",
        }
        assert artifact["status"] == "ok" and artifact["reason"] is None
        assert artifact["bytes"] > 100_000
        for witness in artifact["parity"]["witnesses"]:
            assert witness.keys() >= {"name", "kind", "verdict", "outputs"}
            assert any(letter.isdigit() for letter in witness["name"]), "the name tells the version"
