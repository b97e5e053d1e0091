"""Tokens channels first in Core AI: the same numbers, norms that stay one operation, weights that stay in few bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from folded_networks import folded_network, images_for, logits_of, network_of
from torch import Tensor, nn

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import UsageError
from castling_deploy.export.coreai_asset import AssetContents, look_up_tables, read_asset
from castling_deploy.export.neural_engine import PADDED, unfit
from castling_deploy.export.to_coreai import FILE, CoreAIOptions, CoreAITarget
from castling_deploy.int8.held import misheld
from castling_deploy.int8.quantised import quantised
from castling_deploy.target import Network, Precision

pytest.importorskip("coreai_torch", reason="Core AI's packages have wheels for Linux x86-64 and macOS alone")

TARGET = CoreAITarget()
FIRST = CoreAIOptions(layout="channels-first")
ISLAND = "blocks.0.mlp"


def exported(network: Network, folder: Path, precision: Precision, options: CoreAIOptions = FIRST) -> AssetContents:
    artifact = TARGET.export(network, precision, options, folder)
    assert not TARGET.attest(folder, artifact, precision).problems
    return read_asset(folder / FILE)


def differs(network: Network, folder: Path) -> float:
    """The largest difference from PyTorch, against the largest number there."""
    images = images_for(network, 1)
    with TARGET.load(folder) as session:
        got = session({"image": images})["logits"]
    expected = logits_of(network, images)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("islands", [(), (ISLAND,)])
def test_a_network_is_the_same_and_its_class_token_alone_is_padded(islands: tuple[str, ...], tmp_path: Path) -> None:
    """One matrix of every attention is transposed, and for the last a state besides: products here take none so."""
    network = replace(folded_network("deit"), islands=islands)
    contents = exported(network, tmp_path, Precision.FP16)
    assert differs(network, tmp_path) < 1e-2
    kinds = Counter(step.type for step in contents.steps)
    assert kinds["transpose"] == 3 and kinds["conv2d"] == 11 and kinds["layer_norm"] == 5
    assert Counter(name.rpartition(".")[0] for name in unfit(contents.steps)[PADDED]) == {
        "slice": 4,
        "linalg_vector_norm": 2,
        "broadcasting_maximum": 2,
    }
    wide = [step.type for step in contents.steps if step.outputs[0].dtype == "float32" and step.type != "cast"]
    assert Counter(wide) == ({"conv2d": 2, "broadcasting_add": 2, "gelu": 1} if islands else {})


def test_what_goes_out_is_transposed_before_it_becomes_float32(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 10, 8, 8), nn.Flatten(2), Tokens()).eval()
    network = network_of(layers, (32, 32))
    network = replace(network, outputs=(replace(network.outputs[0], shape=(1, 16, 10)),))
    *_, turned, cast = exported(network, tmp_path, Precision.FP16).steps
    assert (turned.type, turned.outputs[0].dtype, cast.type) == ("transpose", "float16", "cast")


class Tokens(nn.Module):
    """(B, C, N) -> (B, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Normed(nn.Module):
    """LayerNorms of tokens, with weights and without, between maps."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6 * 16, 10)
        self.norm, self.bare = nn.LayerNorm(6, eps=1e-2), nn.LayerNorm(6, elementwise_affine=False)
        with torch.no_grad():
            for each in self.parameters():
                each.copy_(torch.randn(each.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((self.norm(tokens) + self.bare(tokens)).transpose(1, 2).flatten(1))


@pytest.mark.parametrize(("precision", "limit"), [(Precision.FP32, 1e-5), (Precision.FP16, 1e-2)])
def test_a_norm_over_channels_is_one_operation(precision: Precision, limit: float, tmp_path: Path) -> None:
    network = network_of(Normed().eval(), (32, 32))
    contents = exported(network, tmp_path, precision)
    assert differs(network, tmp_path) < limit
    norms = [step for step in contents.steps if step.type == "layer_norm"]
    assert [step.outputs[0].shape for step in norms] == [(1, 6, 1, 16)] * 2
    assert not any(step.type == "transpose" for step in contents.steps)


@pytest.mark.parametrize("palette", [None, 4])
def test_weights_in_few_bits_stay_in_them(palette: int | None, tmp_path: Path) -> None:
    folded = folded_network("deit")
    paths = [path for path, module in folded.module.named_modules() if isinstance(module, nn.Linear)]
    levels = Quantisation(dict.fromkeys(paths, (0.0, 0.0)), Activations.FLOAT16, palette=palette)
    network = replace(folded, quantisation=levels, islands=(ISLAND,))
    contents = exported(network, tmp_path, Precision.INT8, replace(FIRST, palettise=palette))
    assert not misheld(TARGET, tmp_path, network)
    assert look_up_tables(contents) == ({"4": len(paths)} if palette else {})
    held = Counter(one.levels for one in contents.operations if one.name == "conv2d")
    assert held == {"ui4" if palette else "si8": 8, None: 3}  # None: the patches', and one over tokens in each block
    assert differs(replace(network, module=quantised(network.module, levels)), tmp_path) < 1e-2


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown layout 'first'"):
        CoreAIOptions(layout="first")  # type: ignore[arg-type]
