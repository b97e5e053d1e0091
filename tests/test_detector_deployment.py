"""A detector through the public command: exported with its boxes in the graph, verified, opened, timed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from deployments import Run, castling
from detectors import detector_checkpoint
from edits import reseal

import castling_deploy
from castling_deploy.detection import detections

CASES = [("fp32", ["-b", "1"]), pytest.param(("fp16", ["-b", "2"]), marks=pytest.mark.slow), ("fp32", ["--dynamic"])]
CODES = {0, 5}  # rounding may move the raw outputs of random weights by more than the limit: inconclusive, never wrong
Exported = tuple[Path, Path, Run]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "".join((case[0], *case[1])))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The checkpoint, the artefact's folder, and the run that made it."""
    precision, options = request.param
    folder = tmp_path_factory.mktemp("detector")
    checkpoint = detector_checkpoint(folder / "detector.safetensors")
    run = castling(
        "export",
        checkpoint,
        *("--target", "onnx", "--nms", "--precision", precision, *options),
        *("--output", folder / "out", "--no-benchmark", "--json"),
    )
    (artifact,) = run.document["artifacts"]
    assert artifact["path"], run.err
    return checkpoint, Path(artifact["path"]), run


def test_boxes_pass_and_stand_in_every_document(exported: Exported) -> None:
    _, path, run = exported
    parity = run.document["artifacts"][0]["parity"]
    witness = parity["witnesses"][0]
    verdicts = {output["name"]: output["verdict"] for output in witness["outputs"]}
    assert [verdicts[name] for name in ("boxes", "scores", "labels")] == ["pass"] * 3 and len(verdicts) == 11
    assert run.code in CODES, run.err
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["options"]["nms"] is True
    assert [(spec["name"], spec["dtype"]) for spec in manifest["outputs"][-3:]] == [
        ("boxes", "float32"),
        ("scores", "float32"),
        ("labels", "int64"),
    ]
    readme = (path / "README.md").read_text()
    assert "`boxes` (B, K, 4)" in readme and "| boxes | " in readme


def test_verify_and_bench_work_on_it(exported: Exported) -> None:
    checkpoint, path, _ = exported
    for arguments in (("verify", path), ("verify", path, "--checkpoint", checkpoint)):
        run = castling(*arguments, "--json")
        assert run.code in CODES, run.err
        said = [check for check in run.document["checks"] if check["name"].startswith("boxes, by")]
        assert said and all(check["verdict"] == "pass" for check in said), run.err
        assert re.search(r"│ boxes +│", run.err)
    assert castling("bench", path).code == 0


def test_an_open_artefact_says_what_numpy_says_of_its_raw_outputs(exported: Exported) -> None:
    images = np.load(exported[1] / "golden" / "images.npy")[:3]
    with castling_deploy.open(exported[1]) as model:
        outputs = model.outputs(images)
        assert model(images).shape == outputs["cls_pred_stride_8"].shape
    assert outputs["labels"].dtype == np.int64
    for image in range(3):
        found = detections(outputs, images.shape[1:3], image=image)
        np.testing.assert_array_equal(outputs["scores"][image, : len(found)], found.scores)
        np.testing.assert_array_equal(outputs["labels"][image, : len(found)], found.labels)
        np.testing.assert_allclose(outputs["boxes"][image, : len(found)], found.boxes, atol=1e-3)


def another_overlap(graph: onnx.GraphProto) -> None:
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == "nms/iou")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.7), tensor.name))


def another_raw_output(graph: onnx.GraphProto) -> None:
    bias = max((tensor for tensor in graph.initializer if len(tensor.dims) == 1), key=lambda tensor: tensor.dims[0])
    tensor = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(onnx.numpy_helper.from_array(tensor + tensor.dtype.type(1), bias.name))


@pytest.mark.parametrize("change", [another_overlap, another_raw_output])
def test_verify_finds_another_ending_whose_hashes_were_mended(
    change: Callable[[onnx.GraphProto], None], tmp_path: Path
) -> None:
    checkpoint = detector_checkpoint(tmp_path / "detector.safetensors")
    result = castling_deploy.export(checkpoint, target="onnx", nms=True, output=tmp_path)
    assert result.path is not None
    model = onnx.load(result.path / "model.onnx")
    change(model.graph)
    onnx.save(model, result.path / "model.onnx")
    reseal(result.path)
    again = castling("verify", result.path)
    assert again.code == 3 and "FAIL" in again.err


def test_raw_heads_alone_are_what_is_exported_without_the_flag(tmp_path: Path) -> None:
    checkpoint = detector_checkpoint(tmp_path / "detector.safetensors")
    result = castling_deploy.export(checkpoint, target="onnx", output=tmp_path)
    assert result.artifact is not None
    assert not {"boxes", "scores", "labels"} & {spec.name for spec in result.artifact.outputs}
