"""What an artefact was built in is read back from its files; a label on it changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
from folded_networks import network_of
from networks import SMALL_DEIT, conditioned

from castling_deploy.castle import castle
from castling_deploy.errors import ExportError
from castling_deploy.export.to_tensorrt import ENGINE, RTX, installed
from castling_deploy.fold import fold
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.target import TARGETS, Artifact, Attestation, Precision, target_named

Built = tuple[Path, Artifact]
Export = Callable[[str, Precision, tuple[str, ...]], Built]
BOTH = [(Precision.FP32, Precision.FP16), (Precision.FP16, Precision.FP32)]
ATTESTED = ["onnx", "tensorrt", "coreml", "executorch", "coreai"]
ISLAND = ("blocks.0.mlp",)
PRODUCTS = 11  # patch embedding, q, k, v, two of the attention, the token convolution, output, two of the MLP, head


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A DeiT of one block, exported once per target, precision and islands."""

    @cache
    def once(name: str, precision: Precision, islands: tuple[str, ...] = ()) -> Built:
        target, folder = target_named(name), tmp_path_factory.mktemp(name)
        if (missing := target.missing()) is not None:
            pytest.skip(missing.reason)
        module = fold(castle(conditioned(CastlingDeiT(replace(SMALL_DEIT, depth=1)))))
        network = replace(network_of(module, SMALL_DEIT.image_size), islands=islands)
        return folder, target.export(network, precision, target.options(), folder)

    return once


def attested(name: str, built: Built, precision: Precision) -> Attestation:
    folder, artifact = built
    return target_named(name).attest(folder, artifact, precision)


def test_every_target_attests() -> None:
    assert all(hasattr(target_named(name), "attest") for name in TARGETS) and set(ATTESTED) <= TARGETS.keys()


@pytest.mark.parametrize("name", ATTESTED)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_artefact_is_what_it_was_asked_to_be(name: str, precision: Precision, export: Export) -> None:
    found = attested(name, export(name, precision, ()), precision)
    assert found.problems == ()
    assert found.products == {precision.value: sum(found.products.values())}
    assert sum(found.products.values()) >= PRODUCTS
    # ExecuTorch leaves the kernels of convolutions in float32
    dtype, other = ("float32", "float16") if precision is Precision.FP32 else ("float16", "float32")
    assert found.weight_bytes[dtype] > 5 * found.weight_bytes.get(other, 0) or name == "executorch"
    assert found.operations[dtype] > PRODUCTS


@pytest.mark.parametrize("name", ATTESTED)
@pytest.mark.parametrize(("built", "claimed"), BOTH)
def test_another_label_is_refused(name: str, built: Precision, claimed: Precision, export: Export) -> None:
    found = attested(name, export(name, built, ()), claimed)
    assert found.problems and f"{claimed} is claimed" in found.problems[0]
    assert found.products == attested(name, export(name, built, ()), built).products


@pytest.mark.parametrize("name", ATTESTED)
def test_islands_are_counted_and_no_problem(name: str, export: Export) -> None:
    found = attested(name, export(name, Precision.FP16, ISLAND), Precision.FP16)
    plain = attested(name, export(name, Precision.FP16, ()), Precision.FP16)
    assert found.problems == ()
    assert found.products["fp32"] == 2 and found.products["fp16"] == plain.products["fp16"] - 2
    assert found.weight_bytes["float32"] >= plain.weight_bytes.get("float32", 0) + 2 * 4 * 32 * 64
    assert attested(name, export(name, Precision.FP16, ISLAND), Precision.FP32).problems


@pytest.mark.parametrize("name", ATTESTED)
def test_a_file_put_in_the_place_of_another_is_refused(name: str, export: Export, tmp_path: Path) -> None:
    """The manifest says fp16 and is right about everything else; the file is the fp32 one."""
    folder, artifact = export(name, Precision.FP16, ())
    other, _ = export(name, Precision.FP32, ())
    shutil.copytree(folder, tmp_path / "mixed")
    for file in artifact.files:
        source, place = other / file, tmp_path / "mixed" / file
        shutil.copytree(source, place, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, place)
    assert attested(name, (tmp_path / "mixed", artifact), Precision.FP16).problems


@pytest.mark.parametrize("name", ATTESTED)
def test_a_damaged_file_is_an_error_and_no_attestation(name: str, export: Export, tmp_path: Path) -> None:
    folder, artifact = export(name, Precision.FP32, ())
    shutil.copytree(folder, tmp_path / "damaged")
    model = tmp_path / "damaged" / artifact.files[0]
    if model.is_dir():
        next(model / name for name in ("Manifest.json", "main.mlirb") if (model / name).exists()).write_text("{}")
    else:
        model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(ExportError):
        attested(name, (tmp_path / "damaged", artifact), Precision.FP32)


def test_types_that_an_onnx_file_declares_are_not_believed(export: Export, tmp_path: Path) -> None:
    folder, artifact = export("onnx", Precision.FP32, ())
    model = onnx.load(folder / "model.onnx")
    for value in model.graph.value_info:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, tmp_path / "model.onnx")
    assert attested("onnx", (tmp_path, artifact), Precision.FP16).problems


def test_a_manifest_that_counts_other_products_is_refused(export: Export) -> None:
    folder, artifact = export("onnx", Precision.FP16, ())
    edited = replace(artifact, details={**artifact.details, "products": {"fp16": 1}})
    assert "the manifest counts other products" in attested("onnx", (folder, edited), Precision.FP16).problems[0]
    assert json.loads(json.dumps(dict(artifact.details)))["products"]


@pytest.mark.skipif(not installed(RTX), reason="tensorrt-rtx is not installed")
def test_an_engine_of_another_graph_is_refused(export: Export, tmp_path: Path) -> None:
    folder, artifact = export("tensorrt", Precision.FP16, ())
    other, _ = export("tensorrt", Precision.FP32, ())
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(other / ENGINE, tmp_path / "mixed" / ENGINE)
    (problem,) = attested("tensorrt", (tmp_path / "mixed", artifact), Precision.FP16).problems
    assert f"{ENGINE} is not what" in problem
    (tmp_path / "mixed" / ENGINE).unlink()
    assert attested("tensorrt", (tmp_path / "mixed", artifact), Precision.FP16).problems == (f"{ENGINE} is not there",)
