"""The Core AI target: one asset that Apple's own runtime runs as PyTorch does, and that says what was built."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folded_networks import folded_network, images_for, logits_of, network_of
from networks import BASELINES, SMALL, SMALL_DEIT, conditioned, small
from torch import nn

from castling_deploy import eight_bits
from castling_deploy.castle import castle
from castling_deploy.eight_bits import Activations, Quantisation, weight_levels
from castling_deploy.errors import ExportError, ShapeError
from castling_deploy.export import to_coreai
from castling_deploy.export.coreai_asset import read_asset
from castling_deploy.export.coreai_program import Wide, converted, exported_program, numbered, wide_in
from castling_deploy.export.scopes import inside
from castling_deploy.export.to_coreai import CoreAIOptions, CoreAITarget, check
from castling_deploy.fold import fold
from castling_deploy.int8.quantised import quantised
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.target import Artifact, Network, Precision, Witness, WitnessKind

pytest.importorskip("coreai_torch", reason="Core AI's packages have wheels for Linux x86-64 and macOS alone")

TESTS = Path(__file__).parents[1]
TARGET = CoreAITarget()
BATCH = 2
LIMITS = {Precision.FP32: 1e-5, Precision.FP16: 2e-2}


@dataclass(frozen=True)
class Exported:
    network: Network
    precision: Precision
    folder: Path
    artifact: Artifact

    @property
    def path(self) -> Path:
        return self.folder / "model.aimodel"


CASES = [("deit", Precision.FP32), ("deit", Precision.FP16), ("levit", Precision.FP16)]
Export = Callable[[str, Precision], Exported]


def network_named(name: str) -> Network:
    if name == "levit":
        return folded_network(name, BATCH)
    deit = conditioned(CastlingDeiT(replace(SMALL_DEIT, depth=1)))
    return network_of(fold(castle(deit)), SMALL_DEIT.image_size, BATCH, name)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    @cache
    def once(name: str, precision: Precision) -> Exported:
        network, folder = network_named(name), tmp_path_factory.mktemp("coreai")
        return Exported(network, precision, folder, TARGET.export(network, precision, CoreAIOptions(), folder))

    return once


@pytest.fixture(params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, export: Export) -> Exported:
    return export(*request.param)


@pytest.fixture
def deit(export: Export) -> Exported:
    return export("deit", Precision.FP32)


@pytest.fixture
def half(export: Export) -> Exported:
    return export("deit", Precision.FP16)


def differs(network: Network, folder: Path, count: int) -> float:
    """The largest difference from PyTorch, against the largest number there."""
    images = images_for(network, count)
    with TARGET.load(folder) as session:
        outputs = session({"image": images})
    assert outputs.keys() == {"logits"} and outputs["logits"].dtype == np.float32
    expected = logits_of(network, images)
    return float(np.abs(outputs["logits"] - expected).max() / np.abs(expected).max())


def test_core_ai_computes_what_pytorch_computes(exported: Exported) -> None:
    assert differs(exported.network, exported.folder, BATCH) < LIMITS[exported.precision]


@pytest.mark.parametrize("name", [*SMALL, *BASELINES])
def test_every_family_and_its_baseline_can_be_exported(name: str, tmp_path: Path) -> None:
    if name in SMALL:
        network = folded_network(name)
    else:
        network = network_of(fold(small(name)), BASELINES[name][1].image_size, name=name)
    TARGET.export(network, Precision.FP32, CoreAIOptions(), tmp_path)
    assert differs(network, tmp_path, 1) < LIMITS[Precision.FP32]


def test_asset_says_what_was_built(exported: Exported) -> None:
    own = to_coreai.DTYPES[exported.precision]
    details = exported.artifact.details
    assert details["products"].keys() == {exported.precision} and details["products"][exported.precision] > 10
    other = {name for name in details["operations"] if own not in name and not name.startswith("layer_norm/")}
    assert other <= {"cast float32"}
    statistics = "a LayerNorm's mean and variance are float32" in details["notes"]
    assert statistics == (exported.precision is Precision.FP16 and exported.network.name == "deit")


def test_no_float32_enters_a_folded_layer_norm(half: Exported) -> None:
    constants = [one for one in read_asset(half.path).operations if (one.graph, one.name) == ("main", "constant")]
    assert {kind for one in constants for kind in one.results} == {"float16"}


def test_other_precision_is_refused(exported: Exported) -> None:
    contents = read_asset(exported.path)
    other = Precision.FP16 if exported.precision is Precision.FP32 else Precision.FP32
    check(contents, exported.network, exported.precision, Wide())
    with pytest.raises(ExportError, match=f"{other} was asked for, and not built: "):
        check(contents, exported.network, other, Wide())


def test_one_product_in_another_precision_and_none_at_all_are_refused(half: Exported) -> None:
    contents = read_asset(half.path)
    first = next(index for index, one in enumerate(contents.operations) if one.name.endswith("matmul"))
    wrong = replace(contents.operations[first], floats=frozenset({"float16", "float32"}))
    mixed = (*contents.operations[:first], wrong, *contents.operations[first + 1 :])
    with pytest.raises(ExportError, match="matmul in float16 and float32"):
        check(replace(contents, operations=mixed), half.network, Precision.FP16, Wide())
    with pytest.raises(ExportError, match="there is no product"):
        check(replace(contents, operations=()), half.network, Precision.FP16, Wide())


def test_program_of_the_other_precision_is_refused_by_export(
    deit: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        to_coreai, "exported_program", lambda network, precision, layout: exported_program(network, Precision.FP32)
    )
    with pytest.raises(ExportError, match="fp16 was asked for, and not built"):
        TARGET.export(deit.network, Precision.FP16, CoreAIOptions(), tmp_path)


ISLAND = "blocks.0.mlp"


@pytest.fixture(scope="module")
def island(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    network, folder = replace(network_named("deit"), islands=(ISLAND,)), tmp_path_factory.mktemp("island")
    artifact = TARGET.export(network, Precision.FP16, CoreAIOptions(), folder)
    return Exported(network, Precision.FP16, folder, artifact)


def test_an_island_is_float32_and_nothing_else_is(island: Exported, half: Exported) -> None:
    assert island.artifact.details["products"]["fp32"] == 2
    assert sum(island.artifact.details["products"].values()) == half.artifact.details["products"]["fp16"]
    assert island.artifact.details["operations"]["gelu float32"] == 1
    assert (
        island.artifact.details["operations"]["cast float16"] == half.artifact.details["operations"]["cast float16"] + 1
    )
    assert differs(island.network, island.folder, BATCH) < LIMITS[Precision.FP16]


def test_float32_outside_of_the_islands_is_refused(island: Exported) -> None:
    contents = read_asset(island.path)
    wide = wide_in(exported_program(island.network, Precision.FP16), island.network.islands)
    assert wide == Wide(products=2, casts=4)
    check(contents, island.network, Precision.FP16, wide)
    for fewer in (replace(wide, products=1), replace(wide, casts=3)):
        with pytest.raises(ExportError, match="and 2 products and 4 casts were built"):
            check(contents, island.network, Precision.FP16, fewer)
    with pytest.raises(ExportError, match="fp32 was asked for, and not built"):
        check(contents, island.network, Precision.FP32, wide)
    with pytest.raises(ExportError, match="matmul in float32"):
        check(contents, replace(island.network, islands=()), Precision.FP16, wide)


def test_a_norm_in_an_island_has_no_float16_in_it() -> None:
    network = replace(network_named("deit"), islands=("norm",))
    program = exported_program(network, Precision.FP16)
    *others, norm = (node for node in program.graph.nodes if "layer_norm" in str(node.target))
    assert {str(node.meta["val"].dtype) for node in norm.all_input_nodes} == {"torch.float32"}
    assert {str(node.meta["val"].dtype) for other in others for node in other.all_input_nodes} == {"torch.float16"}


class Unit(nn.Module):
    """Rows of length one: their squares leave float16, the rows do not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)


def test_reductions_alone_can_be_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), Unit(), nn.Flatten(1), nn.Linear(512, 10)).eval()
    with torch.no_grad():
        layers[0].weight.mul_(1e3)  # type: ignore[operator, union-attr]
    found = {}
    for reductions in (("2",), ()):
        network = replace(network_of(layers, (32, 32)), reductions=reductions)
        folder = tmp_path / f"of{len(reductions)}"
        folder.mkdir()
        artifact = TARGET.export(network, Precision.FP16, CoreAIOptions(), folder)
        assert artifact.details["products"] == {"fp16": 2}
        found[reductions] = differs(network, folder, 1)
    assert found["2",] < LIMITS[Precision.FP16] < 10 * LIMITS[Precision.FP16] < found[()]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every Linear in 8 bits, those of an island too."""
    network, folder = network_named("deit"), tmp_path_factory.mktemp("int8")
    paths = [path for path, module in network.module.named_modules() if isinstance(module, nn.Linear)]
    levels = Quantisation(dict.fromkeys(paths, (0.0, 0.0)), Activations.FLOAT16)
    network = replace(network, quantisation=levels, islands=(ISLAND,))
    return Exported(network, Precision.INT8, folder, TARGET.export(network, Precision.INT8, CoreAIOptions(), folder))


def test_int8_weights_are_those_of_pytorch_and_smaller(int8: Exported, half: Exported) -> None:
    assert int8.network.quantisation is not None
    held = list(read_asset(int8.path).constants.values())
    for path in int8.network.quantisation.ranges:
        levels, scales = weight_levels(int8.network.module.get_submodule(path).weight.detach().numpy())  # type: ignore[operator, union-attr]
        stored = scales.astype(np.float32 if inside(path, [ISLAND]) else np.float16)[:, None]
        for wanted in (levels, stored):
            assert any(one.dtype == wanted.dtype and np.array_equal(one, wanted) for one in held), path
    sizes = [(each.path / "main.mlirb").stat().st_size for each in (int8, half)]
    assert sizes[0] < 0.8 * sizes[1]


def test_core_ai_computes_what_the_network_in_8_bits_computes(int8: Exported) -> None:
    assert int8.network.quantisation is not None
    network = replace(int8.network, module=quantised(int8.network.module, int8.network.quantisation))
    assert differs(network, int8.folder, BATCH) < LIMITS[Precision.FP16]


def test_attestation_counts_int8_weights(int8: Exported) -> None:
    assert int8.network.quantisation is not None
    found = TARGET.attest(int8.folder, int8.artifact, Precision.INT8)
    assert found.products["int8"] == len(int8.network.quantisation.ranges) and not found.problems
    elements = sum(int8.network.module.get_submodule(path).weight.numel() for path in int8.network.quantisation.ranges)  # type: ignore[operator, union-attr]
    assert elements <= found.weight_bytes["int8"] < 1.2 * elements  # and the zero points
    assert TARGET.attest(int8.folder, int8.artifact, Precision.FP32).problems


def test_weights_that_stayed_in_float_are_refused(int8: Exported, half: Exported) -> None:
    with pytest.raises(ExportError, match="were to have int8 weights"):
        check(read_asset(half.path), replace(int8.network, islands=()), Precision.INT8, Wide())
    with pytest.raises(ExportError, match="0 Linears were to have int8 weights"):
        wide = wide_in(exported_program(int8.network, Precision.INT8), int8.network.islands)
        check(read_asset(int8.path), replace(int8.network, quantisation=None), Precision.INT8, wide)


def test_a_stale_scale_is_seen(int8: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stale(*given: Any) -> tuple[np.ndarray, np.ndarray]:
        levels, scales = weight_levels(*given)
        return levels, 1.1 * scales

    with monkeypatch.context() as patched:
        patched.setattr(eight_bits, "weight_levels", stale)
        TARGET.export(int8.network, Precision.INT8, CoreAIOptions(), tmp_path)
    assert int8.network.quantisation is not None
    network = replace(int8.network, module=quantised(int8.network.module, int8.network.quantisation))
    assert differs(network, tmp_path, BATCH) > LIMITS[Precision.FP16]


def test_inputs_and_outputs_have_the_names_and_types_of_the_network(half: Exported) -> None:
    contents = read_asset(half.path)
    assert contents.inputs == (("image", "tensor<2x3x32x32xf32>"),)
    assert contents.outputs == (("logits", "tensor<2x10xf32>"),)
    with pytest.raises(ExportError, match="interface"):
        check(replace(contents, inputs=(("x", contents.inputs[0][1]),)), half.network, Precision.FP16, Wide())


def test_facts_travel_inside_and_nothing_of_this_machine_does(exported: Exported) -> None:
    metadata = read_asset(exported.path).metadata
    assert metadata["description"] == exported.network.description and "creationDate" not in metadata
    assert exported.network.metadata.items() <= metadata["creatorDefinedMetadata"]["castling"].items()
    data = b"".join(file.read_bytes() for file in exported.path.iterdir())
    for trace in (".py", "site-packages", str(Path.home()), str(Path.cwd())):
        assert trace.encode() not in data


def test_same_network_gives_the_same_bytes_in_another_process(half: Exported, tmp_path: Path) -> None:
    code = f"""
import sys; from pathlib import Path; sys.path[:0] = {[str(TESTS), str(TESTS / "export")]!r}
from test_to_coreai import TARGET, CoreAIOptions, Precision, network_named
TARGET.export(network_named("deit"), Precision.FP16, CoreAIOptions(), Path({str(tmp_path)!r}))
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    for file in half.path.iterdir():
        assert (tmp_path / "model.aimodel" / file.name).read_bytes() == file.read_bytes(), file.name


def test_names_are_numbered_in_their_order() -> None:
    assert numbered("@b_zz @b_aa @b_zz", "b_[a-z]{2}", "b") == "@b_0 @b_1 @b_0"


def test_usage_holds_the_shape(exported: Exported) -> None:
    height, width = exported.network.preprocessing.size
    assert f"shape: [2, 3, {height}, {width}])" in exported.artifact.usage
    assert f"[2, 3, {height}, {width}] float32, normalised" in exported.artifact.usage


def test_session_runs_where_an_event_loop_runs_already(deit: Exported) -> None:
    """As in a notebook."""

    async def notebook() -> float:
        return differs(deit.network, deit.folder, BATCH)

    assert asyncio.run(notebook()) < LIMITS[Precision.FP32]


def test_strides_of_the_input_do_not_matter(deit: Exported) -> None:
    images = images_for(deit.network, BATCH)
    with TARGET.load(deit.folder) as session:
        transposed = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        assert not transposed.flags.c_contiguous
        np.testing.assert_array_equal(session({"image": transposed})["logits"], session({"image": images})["logits"])


def test_output_survives_the_next_call_and_a_closed_session_is_said_to_be_closed(deit: Exported) -> None:
    first, second = np.split(images_for(deit.network, 2 * BATCH), 2)
    with TARGET.load(deit.folder) as session:
        logits = session({"image": first})["logits"]
        kept = logits.copy()
        assert np.abs(session({"image": second})["logits"] - kept).max() > 0.1
    np.testing.assert_array_equal(logits, kept)
    with pytest.raises(ExportError, match="closed"):
        session({"image": first})


def test_wrong_input_is_an_error(deit: Exported) -> None:
    images = images_for(deit.network, BATCH)
    with TARGET.load(deit.folder) as session:
        for wrong in ({"image": images[:1]}, {"image": images.astype(np.float64)}, {"picture": images}):
            with pytest.raises(RuntimeError, match=r"image|picture"):
                session(wrong)


@pytest.mark.parametrize("damage", ["absent", "no program", "cut short", "one bit", "not bytecode", "metadata"])
def test_asset_that_is_damaged_is_an_export_error(deit: Exported, tmp_path: Path, damage: str) -> None:
    import hashlib
    import shutil

    path = tmp_path / "model.aimodel"
    if damage != "absent":
        shutil.copytree(deit.path, path)
        program = path / "main.mlirb"
        data = bytearray(program.read_bytes())
        if damage == "no program":
            program.unlink()
        elif damage == "cut short":
            program.write_bytes(data[: len(data) // 2])
        elif damage == "one bit":
            data[-100] ^= 1
            program.write_bytes(data)
        elif damage == "not bytecode":  # with a digest that fits
            program.write_bytes(bytes(5000))
            (path / "main.hash").write_bytes(hashlib.sha256(bytes(5000)).digest())
        else:
            (path / "metadata.json").write_text("{")
    with pytest.raises(ExportError, match=r"model\.aimodel"), TARGET.load(tmp_path):
        pass
    if damage != "absent":
        with pytest.raises(ExportError, match=r"model\.aimodel"):
            read_asset(path)


def test_open_axis_is_refused() -> None:
    network = network_named("deit")
    (image,) = network.inputs
    with pytest.raises(ShapeError, match="fixed shapes"):
        exported_program(replace(network, inputs=(replace(image, shape=(-1, 3, 32, 32)),)), Precision.FP32)


def test_operation_that_core_ai_lacks_is_an_export_error() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(image[0, 0] @ image[0, 0].T)[None, :10]

    network = network_of(Unknown(), (32, 32))
    with pytest.raises(ExportError, match="coreai-torch refuses the network"):
        converted(exported_program(network, Precision.FP32), ("image",), ("logits",))


def test_nothing_is_printed_by_a_quiet_export(tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "import castling_deploy\n"
            "network = castling_deploy.load(model='castling-deit-digits')\n"
            f"made = castling_deploy.export(network, target='aimodel', precision='fp32', output={str(tmp_path)!r})\n"
            "with castling_deploy.open(made.path) as model: pass",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (process.stdout, process.stderr) == ("", "")
    (folder,) = tmp_path.iterdir()
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["verdict"] == "pass"


def test_witness_is_the_runtime() -> None:
    assert TARGET.missing() is None and TARGET.unfinished() is None
    if sys.platform == "linux":
        assert TARGET.witness() == Witness(
            "coreai-core 1.0.0b3 (CPU interpreter, Linux)", WitnessKind.RUNTIME, interpreted=True
        )
        assert TARGET.images == {Precision.FP16: 12, Precision.INT8: 12}


def test_other_versions_other_machines_and_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    for version, reason in (
        (lambda package: "0.9", "0.9 is installed, and 1.0.0b3 is needed"),
        (absent, "not installed"),
    ):
        monkeypatch.setattr(to_coreai, "version", version)
        missing = TARGET.missing()
        assert missing is not None and reason in missing.reason
        assert missing.fix == "pip install 'castling-deploy[coreai]'"
        assert "coreai-core" in TARGET.witness().name
    if sys.platform == "linux":
        monkeypatch.setattr(to_coreai.platform, "machine", lambda: "aarch64")
        missing = TARGET.missing()
        assert missing is not None and "no wheels for Linux on aarch64" in missing.reason
        assert "macOS or on Linux x86-64" in missing.fix
