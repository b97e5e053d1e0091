"""Palettised weights in Core AI: packed below a byte, computed by its interpreter, counted from the file alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from folded_networks import images_for, network_of
from networks import SMALL_DEIT, conditioned
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export import torch_palette
from castling_deploy.export.coreai_asset import constants_of, look_up_tables, read_asset
from castling_deploy.export.scopes import inside
from castling_deploy.export.to_coreai import CoreAIOptions, CoreAITarget
from castling_deploy.fold import fold
from castling_deploy.int8.quantised import quantised
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.palette import BITS, packed, palettised
from castling_deploy.target import Artifact, Network, Precision

pytest.importorskip("coreai_torch", reason="Core AI's packages have wheels for Linux x86-64 and macOS alone")

TARGET = CoreAITarget()
FILE = "model.aimodel"
ISLAND = "blocks.0.mlp"
LIMIT = 2e-2  # of the largest number


@dataclass(frozen=True)
class Exported:
    network: Network
    folder: Path
    artifact: Artifact

    @property
    def levels(self) -> Quantisation:
        assert self.network.quantisation is not None
        return self.network.quantisation

    def weight(self, path: str) -> np.ndarray:
        weight: np.ndarray = self.network.module.get_submodule(path).weight.detach().numpy()  # type: ignore[operator, union-attr]
        return weight


def in_tables(network: Network, bits: int | None) -> Network:
    """Every Linear by so many bits, or in levels, those of an island too."""
    paths = [path for path, module in network.module.named_modules() if isinstance(module, nn.Linear)]
    return replace(network, quantisation=Quantisation(dict.fromkeys(paths, (0.0, 0.0)), Activations.FLOAT16, {}, bits))


@pytest.fixture(scope="module")
def small() -> Network:
    deit = conditioned(CastlingDeiT(replace(SMALL_DEIT, depth=1)))
    return replace(network_of(fold(castle(deit)), SMALL_DEIT.image_size, name="deit"), islands=(ISLAND,))


@pytest.fixture(scope="module")
def export(small: Network, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Exported]:
    @cache
    def once(bits: int | None) -> Exported:
        network, folder = in_tables(small, bits), tmp_path_factory.mktemp("palette")
        return Exported(network, folder, exported(network, folder))

    return once


def exported(network: Network, folder: Path) -> Artifact:
    assert network.quantisation is not None
    return TARGET.export(network, Precision.INT8, CoreAIOptions(palettise=network.quantisation.palette), folder)


def differs(network: Network, folder: Path) -> float:
    """The largest difference from the palettised network in PyTorch, against the largest number there."""
    assert network.quantisation is not None
    images = images_for(network, 1)
    with torch.no_grad():
        expected = quantised(network.module, network.quantisation)(torch.from_numpy(images)).numpy()
    with TARGET.load(folder) as session:
        got = session({"image": images})["logits"]
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("bits", BITS)
def test_asset_holds_and_computes_what_the_palettised_network_does(
    bits: int, export: Callable[[int | None], Exported]
) -> None:
    made = export(bits)
    held = list(read_asset(made.folder / FILE).constants.values())
    for path in made.levels.ranges:
        indices, table = palettised(made.weight(path), bits)
        stored = packed(indices, bits) if bits < 8 else indices
        assert any(one.dtype == np.uint8 and np.array_equal(one, stored) for one in held), path
        numbers = table.astype(np.float32 if inside(path, [ISLAND]) else np.float16).reshape(1, 1, -1, 1)
        assert any(one.dtype == numbers.dtype and np.array_equal(one, numbers) for one in held), path
    assert differs(made.network, made.folder) < LIMIT


@pytest.mark.parametrize("bits", BITS)
def test_attestation_counts_tables_and_the_bytes_of_indices(
    bits: int, export: Callable[[int | None], Exported]
) -> None:
    made = export(bits)
    linears = len(made.levels.ranges)
    found = TARGET.attest(made.folder, made.artifact, Precision.INT8)
    assert found.products["int8"] == linears > 5 and not found.problems
    assert made.artifact.details["look_up_tables"] == {str(bits): linears}
    assert found.weight_bytes["uint8"] == sum(-(-made.weight(path).size * bits // 8) for path in made.levels.ranges)
    claimed = replace(made.artifact, details={**made.artifact.details, "look_up_tables": {"2": linears}})
    assert TARGET.attest(made.folder, claimed, Precision.INT8).problems


def test_fewer_bits_take_less_room(export: Callable[[int | None], Exported]) -> None:
    sizes = [(export(bits).folder / FILE / "main.mlirb").stat().st_size for bits in BITS]
    elements = sum(export(4).weight(path).size for path in export(4).levels.ranges)
    for few, many in pairwise(sizes):
        assert many - few > 0.24 * elements  # two bits of each index, and a larger table


def test_the_same_network_gives_the_same_bytes(export: Callable[[int | None], Exported], tmp_path: Path) -> None:
    made = export(4)
    exported(made.network, tmp_path)
    for file in (made.folder / FILE).iterdir():
        assert (tmp_path / FILE / file.name).read_bytes() == file.read_bytes(), file.name
    resources = [name for name in read_asset(tmp_path / FILE).constants if "." not in name]
    assert sorted(resources) == sorted(f"weight_{number}" for number in range(len(resources)))


@pytest.mark.parametrize("wrong", ["table", "indices"])
def test_a_wrong_table_or_index_is_seen(
    wrong: str, export: Callable[[int | None], Exported], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stale(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
        indices, table = palettised(weight, bits)
        return (indices, (1.1 * table).astype(np.float16)) if wrong == "table" else (np.roll(indices, 1), table)

    monkeypatch.setattr(torch_palette, "palettised", stale)
    exported(export(4).network, tmp_path)
    assert differs(export(4).network, tmp_path) > LIMIT


@pytest.mark.parametrize(("built", "asked"), [(None, 4), (6, 4), (4, None)])
def test_other_weights_than_were_asked_for_are_refused(
    built: int | None,
    asked: int | None,
    small: Network,
    export: Callable[[int | None], Exported],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    contents = read_asset(export(built).folder / FILE)
    monkeypatch.setattr("castling_deploy.export.to_coreai.read_asset", lambda path: contents)
    with pytest.raises(ExportError, match=f"a look-up table by {asked} bits"):
        exported(in_tables(small, asked), tmp_path)


def test_a_constant_weight_and_one_of_no_whole_bytes(tmp_path: Path) -> None:
    """MLIR would write the first one's indices as a single number, which coreai-core cannot read back."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Flatten(2), nn.Linear(16, 3), nn.Linear(3, 3), nn.Flatten(1))
    layers.append(nn.Linear(15, 10)).eval()
    with torch.no_grad():
        layers[2].weight.fill_(0.125)  # type: ignore[operator, union-attr]
    network = in_tables(network_of(layers, (32, 32)), 4)
    exported(network, tmp_path)
    contents = read_asset(tmp_path / FILE)
    assert look_up_tables(contents) == {"4": 3}
    sizes = sorted(values.size for values in contents.constants.values() if values.dtype == np.uint8)
    assert sizes == [5, 24, 75]  # of 9, 48 and 150 indices
    assert differs(network, tmp_path) < LIMIT


def test_indices_that_are_no_resource_are_an_error_and_not_the_end_of_the_process() -> None:
    from coreai._compiler.ir import Module
    from coreai_torch.converter import Context

    text = """
    coreai.graph @main() -> (tensor<2x2xui4> {coreai.name = "y"}) attributes {__coreai_pure__} {
      %0 = coreai.constant dense<3> : tensor<2x2xui4>
      coreai.output %0 : tensor<2x2xui4>
    }"""
    with Context(), pytest.raises(ValueError, match="not among its resources"):
        list(constants_of(Module.parse(text)))


def test_other_tables_are_refused() -> None:
    with pytest.raises(UsageError, match="by 5 bits"):
        CoreAIOptions(palettise=5)
