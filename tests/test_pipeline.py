"""The main job on the default network: every target, every rung, real images, real accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from deployments import castling
from edits import reseal
from every_artefact import (
    Deployed,
    artifact_of,
    combinations,
    computes_what_pytorch_computes,
    has_the_promised_keys,
)
from exported import copied, exported

import castling_deploy
from castling_deploy import bundled
from castling_deploy.artifact import SEAL, read_folder
from castling_deploy.target import TARGETS


@pytest.mark.parametrize(("network", "target", "precision"), combinations(bundled.DEFAULT))
def test_every_artefact_computes_what_pytorch_computes(
    network: str, target: str, precision: str, deployed: Deployed
) -> None:
    computes_what_pytorch_computes(network, target, precision, deployed)


def test_the_document_has_the_promised_keys(deployed: Deployed) -> None:
    has_the_promised_keys(bundled.DEFAULT, deployed)


def test_latency_is_measured_where_a_vendors_runtime_ran_and_null_elsewhere(
    deployed: Deployed,
) -> None:
    for artifact in deployed(bundled.DEFAULT, "fp32").document["artifacts"]:
        kinds = {witness["kind"] for witness in artifact["parity"]["witnesses"]}
        if kinds & {"runtime", "device"} and artifact["target"] != "coreai":  # an interpreter on Linux
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
    again = target in (
        "onnx",
        "executorch",
    )  # the whole comparison: what it costs is the target's, what it tells is not
    seen = castling_deploy.verify(path, bundled.checkpoint_path(bundled.DEFAULT) if again else None)
    assert seen.verdict == "pass" and (seen.parity is not None) is again
    images = np.load(path / "golden" / "images.npy")
    with castling_deploy.open(path) as model:
        np.testing.assert_allclose(model(images[:3]), np.load(path / "golden" / "logits.npy")[:3], atol=1e-3)


@pytest.mark.parametrize(
    "targets", [("onnx",), pytest.param(("coreml", "coreai", "executorch"), marks=pytest.mark.slow)], ids=",".join
)
def test_two_runs_in_two_processes_give_the_same_bytes(
    targets: tuple[str, ...], deployed: Deployed, tmp_path: Path
) -> None:
    """Engines are left out: NVIDIA's builder chooses kernels anew."""
    first = deployed(bundled.DEFAULT, "fp32")
    second = castling(
        "export", "--target", ",".join(targets), "--precision", "fp32", "--no-benchmark", "--output", tmp_path, "--json"
    )
    for target in targets:
        one, two = (read_folder(Path(artifact_of(run, target)["path"])) for run in (first, second))
        same = {name: digest for name, digest in one.files.items() if name != "latency.json"}
        assert same == dict(two.files)
        unlike = {"files": None, SEAL: None}
        assert {**one.manifest, **unlike} == {**two.manifest, **unlike}


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
