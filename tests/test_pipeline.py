"""The main job on the trained networks: every target, every rung, real images, real accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import Run, castling
from edits import reseal
from exported import copied, exported

import castling_deploy
from castling_deploy import bundled
from castling_deploy.artifact import read_folder
from castling_deploy.target import TARGETS, Precision, images_for, target_named

# Every precision of every target, on both bundled networks: (network, target, precision).
EVERYTHING = [
    (network, name, precision.value)
    for network in bundled.CHECKPOINTS
    for name in TARGETS
    for precision in target_named(name).precisions
]
# Core AI's interpreter computes float16 number by number: one network of it always, the others on demand.
SLOW = [(network, "coreai", "fp16") for network in bundled.CHECKPOINTS if network != bundled.DEFAULT]
LIMITS = {"fp32": 1e-4, "fp16": 2e-2}
# Metric, what the trained network reaches, and by how much an artefact may differ in fp32 and in fp16, all in percent:
# no image and one of 360; boxes and pixels that lie on the edge of a threshold.
SCORES = {
    "classification": ("top-1", 97, 0, 0.3),
    "detection": ("mAP", 75, 0.05, 0.5),
    "segmentation": ("mIoU", 75, 0.01, 0.1),
}
Deployed = Callable[..., Run]


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """`castling export --json` of a bundled network in a precision to all targets, or to the slow ones, run once.

    Timed is the default network alone, in fp32.
    """
    runs: dict[tuple[str, str, bool], Run] = {}
    output = tmp_path_factory.mktemp("deployed")

    def run(network: str, precision: str, slow: bool = False) -> Run:
        if (network, precision, slow) not in runs:
            timed = (network, precision) == (bundled.DEFAULT, "fp32")
            targets = [target for name, target, other in EVERYTHING if (name, other) == (network, precision)]
            runs[network, precision, slow] = castling(
                "export",
                "--model",
                network,
                "--target",
                ",".join(target for target in targets if ((network, target, precision) in SLOW) is slow),
                "--precision",
                precision,
                "--output",
                output,
                "--json",
                *([] if timed else ["--no-benchmark"]),
            )
        return runs[network, precision, slow]

    return run


def artifact_of(run: Run, target: str) -> dict[str, Any]:
    (artifact,) = (artifact for artifact in run.document["artifacts"] if artifact["target"] == target)
    return artifact  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("network", "target", "precision"),
    [pytest.param(*each, marks=pytest.mark.slow if each in SLOW else ()) for each in EVERYTHING],
)
def test_every_artefact_computes_what_pytorch_computes(
    network: str, target: str, precision: str, deployed: Deployed
) -> None:
    run = deployed(network, precision, (network, target, precision) in SLOW)
    artifact = artifact_of(run, target)
    parity = artifact["parity"]
    limit = LIMITS[precision]
    assert parity["verdict"] == "pass", run.err
    assert parity["power"] >= 0.95
    assert [rung["name"] for rung in parity["rungs"]] == ["cast", "fold", "exported"]
    assert all(rung["verdict"] == "pass" for rung in parity["rungs"])
    assert parity["rungs"][1]["rel"] < 1e-12
    (witness,) = parity["witnesses"]
    for output in witness["outputs"]:
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
    assert differs <= (fp32_differs if precision == "fp32" else fp16_differs)


@pytest.mark.parametrize("network", bundled.CHECKPOINTS)
def test_the_document_has_the_promised_keys(network: str, deployed: Deployed) -> None:
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


def test_latency_is_measured_where_a_vendors_runtime_ran_and_null_elsewhere(
    deployed: Deployed,
) -> None:
    for artifact in deployed(bundled.DEFAULT, "fp32").document["artifacts"]:
        kinds = {witness["kind"] for witness in artifact["parity"]["witnesses"]}
        if kinds & {"runtime", "device"}:
            latency = artifact["latency"]
            assert 0 < latency["artifact"]["min_s"] <= latency["artifact"]["median_s"] <= latency["artifact"]["p95_s"]
            assert len(latency["artifact"]["times_s"]) == len(latency["pytorch_eager"]["times_s"]) >= 10
            assert latency["threads"] == 1
        else:
            assert artifact["latency"] is None


@pytest.mark.parametrize("target", TARGETS)
def test_the_folder_holds_what_the_manifest_promises(target: str, deployed: Deployed) -> None:
    artifact = artifact_of(deployed(bundled.DEFAULT, "fp32"), target)
    path = Path(artifact["path"])
    assert path.name == f"{bundled.DEFAULT}-{target}-fp32"
    folder = read_folder(path)
    assert folder.changed() == ()
    assert {"manifest.json", "parity.json", "README.md", "golden/images.npy", "golden/logits.npy"} <= set(
        artifact["files"]
    )
    for file in folder.artifact.files:
        assert (path / file).exists()
    manifest = folder.manifest
    assert manifest["preprocessing"]["mean"] and manifest["preprocessing"]["resize_kernel"] == "bilinear"
    assert manifest["labels"] == [str(digit) for digit in range(10)]
    assert manifest["tools"]["torch"] and manifest["loads_with"]
    assert np.load(path / "golden" / "images.npy").dtype == np.uint8
    readme = (path / "README.md").read_text()
    assert "castling verify" in readme and "```" in readme


@pytest.mark.parametrize("target", TARGETS)
def test_verify_passes_on_what_export_wrote_and_opens_it_from_numpy(target: str, deployed: Deployed) -> None:
    path = Path(artifact_of(deployed(bundled.DEFAULT, "fp32"), target)["path"])
    seen = castling_deploy.verify(path, bundled.checkpoint_path(bundled.DEFAULT))
    assert seen.verdict == "pass" and seen.parity is not None
    images = np.load(path / "golden" / "images.npy")
    with castling_deploy.open(path) as model:
        np.testing.assert_allclose(model(images[:3]), np.load(path / "golden" / "logits.npy")[:3], atol=1e-3)


def test_two_runs_in_two_processes_give_the_same_bytes(deployed: Deployed, tmp_path: Path) -> None:
    """Engines are left out: NVIDIA's builder chooses kernels anew."""
    first = deployed(bundled.DEFAULT, "fp32")
    targets = ("onnx", "coreml", "coreai", "executorch")
    second = castling(
        "export", "--target", ",".join(targets), "--precision", "fp32", "--no-benchmark", "--output", tmp_path, "--json"
    )
    for target in targets:
        one, two = (read_folder(Path(artifact_of(run, target)["path"])) for run in (first, second))
        same = {name: digest for name, digest in one.files.items() if name != "latency.json"}
        assert same == dict(two.files)
        assert {**one.manifest, "files": None} == {**two.manifest, "files": None}


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def flip_middle(content: bytearray) -> None:
    content[len(content) // 2] ^= 0xFF


def test_verify_names_what_was_changed_after_the_export(tmp_path: Path) -> None:
    path = copied(exported(bundled.DEFAULT, "onnx", "fp32"), tmp_path)
    edit(path / "model.onnx", flip_middle)
    (path / "surplus").write_text("x")
    again = castling("verify", path)
    assert again.code == 3 and "model.onnx, surplus" in again.err


def test_verify_finds_a_wrong_model_whose_hashes_were_mended(tmp_path: Path) -> None:
    """Somebody exchanges the model and writes its hash into the manifest: the golden outputs still tell."""
    path = copied(exported(bundled.DEFAULT, "onnx", "fp32"), tmp_path / "a")
    network = castling_deploy.load()
    head = network.get_submodule("head.linear")
    head.bias.data = head.bias.data.roll(1)  # type: ignore[union-attr, operator]
    wrong = castling_deploy.export(network, target="onnx", output=tmp_path / "b")
    assert wrong.path is not None
    (path / "model.onnx").write_bytes((wrong.path / "model.onnx").read_bytes())
    reseal(path)
    again = castling("verify", path)
    assert again.code == 3 and "FAIL" in again.err
