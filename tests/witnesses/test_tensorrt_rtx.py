"""TensorRT-RTX's builder takes the typed graph of an artefact, in the types it is written in."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from exported import CLASSIFIER, DETECTOR, MODEL, damaged, exported, outputs_of

from castling_deploy.artifact import Folder, read_folder
from castling_deploy.errors import ExportError
from castling_deploy.target import WitnessKind
from castling_deploy.witnesses.tensorrt_rtx import RtxBuilder

pytest.importorskip("tensorrt_rtx")


def taken(folder: Folder) -> bool:
    return outputs_of(RtxBuilder(), folder, 1) == {}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", [CLASSIFIER, pytest.param(DETECTOR, marks=pytest.mark.slow)])
def test_it_takes_the_artefact_and_leaves_the_folder_as_it_was(model: str, precision: str) -> None:
    folder = exported(model, "tensorrt", precision)
    assert taken(folder)
    assert not folder.changed()


def test_an_operator_that_it_lacks_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(exported(CLASSIFIER, "tensorrt", "fp32").path, tmp_path / "changed")
    graph = onnx.load(tmp_path / "changed" / MODEL)
    graph.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(graph, tmp_path / "changed" / MODEL)
    with pytest.raises(ExportError, match=r"refuses model\.onnx.*NoSuchOperator"):
        taken(read_folder(tmp_path / "changed"))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx"):
        taken(damaged(exported(CLASSIFIER, "tensorrt", "fp32"), tmp_path / "damaged"))


def test_a_graph_in_other_types_than_the_manifest_says_is_an_error() -> None:
    folder = exported(CLASSIFIER, "tensorrt", "fp32")
    artifact = replace(folder.artifact, details={**folder.artifact.details, "products": {"fp16": 1}})
    with pytest.raises(ExportError, match="the engine's are"):
        taken(replace(folder, artifact=artifact))


def test_it_never_claims_to_have_run_anything() -> None:
    assert RtxBuilder().missing() is None
    assert RtxBuilder().witness().kind is WitnessKind.BUILDER
