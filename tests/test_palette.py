"""Palettised weights: a table that loses little, packed as MIL has it, verified against the same table in PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from deployments import castling
from edits import reseal
from exported import CLASSIFIER, exported
from folded_networks import folded_network, images_for
from torch import nn

import castling_deploy
from castling_deploy.artifact import Folder, read_folder
from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export import to_coreml
from castling_deploy.export.coreml_contents import LOOK_UP, look_up_tables
from castling_deploy.export.mil_evaluator import load_program
from castling_deploy.export.mil_package import read_package
from castling_deploy.export.to_coreml import CoreMLOptions, CoreMLTarget
from castling_deploy.int8.quantised import quantised
from castling_deploy.palette import BITS, packed, palettised
from castling_deploy.target import Network, Precision, Readable, target_named

PACKAGE = "model.mlpackage"
WEIGHT = np.random.default_rng(0).standard_normal((48, 33)).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_every_weight_is_the_nearest_number_of_its_table(bits: int) -> None:
    indices, table = palettised(WEIGHT, bits)
    assert indices.shape == WEIGHT.shape and table.shape == (2**bits,) and (np.diff(table) >= 0).all()
    nearest = np.abs(WEIGHT[..., None] - table.astype(np.float32)).min(-1)
    np.testing.assert_allclose(np.abs(WEIGHT - table[indices].astype(np.float32)), nearest, atol=1e-6)


def test_a_table_loses_less_than_even_steps() -> None:
    indices, table = palettised(WEIGHT, 4)
    step = np.ptp(WEIGHT) / 15
    even = np.round((WEIGHT - WEIGHT.min()) / step) * step + WEIGHT.min()
    assert np.square(WEIGHT - table[indices]).mean() < 0.75 * np.square(WEIGHT - even).mean()


def test_few_different_weights_are_kept_exactly() -> None:
    weight = np.array([[0.5, -0.25], [0.5, 0.0], [3.0, 0.0]], np.float32)
    indices, table = palettised(weight, 4)
    np.testing.assert_array_equal(table[indices], weight)
    constant = np.full((2, 3), 0.125, np.float32)
    indices, table = palettised(constant, 4)
    np.testing.assert_array_equal(table[indices], constant)


def test_indices_are_packed_lowest_bit_first() -> None:
    """As coremltools documents constexpr_lut_to_dense: with 2 bits, the indices 0, 3, 2, 1 are one byte. Core AI's
    interpreter reads them so."""
    np.testing.assert_array_equal(packed(np.array([0, 3, 2, 1, 3]), 2), [0b01101100, 0b11])
    np.testing.assert_array_equal(packed(np.array([1, 2]), 6), [0b10000001, 0])


@pytest.fixture(scope="module")
def network() -> Network:
    """Every Linear by 4 bits, those of an island too."""
    folded = folded_network("deit")
    paths = [path for path, module in folded.module.named_modules() if isinstance(module, nn.Linear)]
    levels = Quantisation(dict.fromkeys(paths, (0.0, 0.0)), Activations.FLOAT16, palette=4)
    return replace(folded, quantisation=levels, islands=("blocks.0.mlp",))


def reference(network: Network, images: np.ndarray) -> np.ndarray:
    assert network.quantisation is not None
    with torch.no_grad():
        outputs: np.ndarray = quantised(network.module, network.quantisation)(torch.from_numpy(images)).numpy()
    return outputs


def test_package_holds_and_computes_what_the_palettised_network_does(network: Network, tmp_path: Path) -> None:
    artifact = CoreMLTarget().export(network, Precision.INT8, CoreMLOptions(palettise=4), tmp_path)
    package = read_package(tmp_path / PACKAGE)
    assert network.quantisation is not None
    assert look_up_tables(package) == artifact.details["look_up_tables"] == {"4": len(network.quantisation.ranges)}
    written = {
        (package.constants[one.inputs["indices"][0]].tobytes(), package.constants[one.inputs["lut"][0]].tobytes())  # type: ignore[union-attr]
        for one in package.operations
        if one.type == LOOK_UP and one.outputs[0].dtype == "FLOAT16"
    }
    for path in network.quantisation.ranges:
        if not path.startswith("blocks.0.mlp"):
            indices, table = palettised(network.module.get_submodule(path).weight.detach().numpy(), 4)  # type: ignore[operator, union-attr]
            assert (packed(indices, 4).tobytes(), table.tobytes()) in written, path
    images = images_for(network, 1)
    expected = reference(network, images)
    got = load_program(tmp_path / PACKAGE)({"image": images})["logits"]
    assert isinstance(got, np.ndarray)
    assert np.abs(got - expected).max() < 1e-2 * np.abs(expected).max()
    found = CoreMLTarget().attest(tmp_path, artifact, Precision.INT8)
    assert found.products["int8"] == len(network.quantisation.ranges) and not found.problems
    claimed = replace(artifact, details={**artifact.details, "look_up_tables": {}})
    assert CoreMLTarget().attest(tmp_path, claimed, Precision.INT8).problems


def test_weights_without_their_tables_are_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(to_coreml, "look_up_tables", lambda package: {"4": 1})
    with pytest.raises(ExportError, match="a look-up table by 4 bits"):
        CoreMLTarget().export(network, Precision.INT8, CoreMLOptions(palettise=4), tmp_path)


# Core AI's interpreter takes half a minute for an export or a look at one; tests/export has it on a small network.
@pytest.fixture(scope="module", params=["coreml", pytest.param("coreai", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    result = castling_deploy.export(
        castling_deploy.load(model=CLASSIFIER),
        target=request.param,
        precision="int8",
        output=tmp_path_factory.mktemp("palette"),
        benchmark=False,
        palettise=4,
    )
    assert result.path is not None
    return read_folder(result.path)


def bytes_in(folder: Folder) -> int:
    model = folder.path / target_named(folder.target).file
    return sum(file.stat().st_size for file in model.rglob("*") if file.is_file())


def test_trained_network_keeps_its_score_in_less_room(folder: Folder) -> None:
    parity = json.loads((folder.path / "parity.json").read_text())
    assert parity["verdict"] == "pass" and parity["int8"]["palette"] == 4 and parity["int8"]["drop"] <= 0.5
    score = parity["accuracy"]["artifact"]  # a slow witness sees too few images to be scored
    assert folder.target == "coreai" if score is None else score >= parity["accuracy"]["reference"] - 0.5
    assert folder.artifact.details["look_up_tables"] == {"4": len(parity["int8"]["ranges"])}
    assert bytes_in(folder) < 0.75 * bytes_in(exported(CLASSIFIER, folder.target, "int8"))
    assert bytes_in(folder) < 0.45 * bytes_in(exported(CLASSIFIER, folder.target, "fp16"))


def test_stale_tables_fail_the_gate(folder: Folder) -> None:
    """All of them: behind its norm, a query's scale hardly matters. The last test of this folder: it changes it."""
    assert castling("verify", folder.path).code == 0
    target = target_named(folder.target)
    assert isinstance(target, Readable)
    tables = [values for values in target.constants(folder.path).values() if is_table(values)]
    assert len(tables) == folder.artifact.details["look_up_tables"]["4"]
    file = next((folder.path / target.file).rglob("weight.bin" if target.name == "coreml" else "main.mlirb"))
    data = file.read_bytes()
    for table in tables:
        assert data.count(table.tobytes()) == 1
        data = data.replace(table.tobytes(), (1.5 * table).astype(np.float16).tobytes())
    file.write_bytes(data)
    if (digest := file.with_name("main.hash")).exists():
        digest.write_bytes(sha256(data).digest())
    reseal(folder.path)
    assert castling("verify", folder.path).code == 3


def is_table(values: np.ndarray) -> bool:
    return (
        values.dtype == np.float16
        and values.size == 16 == max(values.shape)
        and bool((np.diff(values.flat) >= 0).all())
    )


@pytest.mark.parametrize("target", ["coreml", "coreai"])
@pytest.mark.parametrize("options", [["--palettise", "5"], ["--palettise", "4", "--precision", "fp16"]])
def test_other_tables_and_other_precisions_are_refused(target: str, options: list[str]) -> None:
    run = castling("export", "--target", target, "--precision", "int8", *options)
    assert run.code == 2 and ("by 5 bits" in run.err or "is for int8" in run.err)
    with pytest.raises(UsageError, match="by 5 bits"):
        target_named(target).options(palettise=5)
