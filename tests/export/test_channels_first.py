"""Tokens channels first: exact, whatever is done to them, and nothing left for the Neural Engine to pad or move."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployments import castling
from folded_networks import folded_network, images_for, logits_of
from networks import SMALL, dense
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from castling_deploy.castle import castle
from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.export import channels_first
from castling_deploy.export.channels_first import Laid, in_channels_first
from castling_deploy.export.coreml_contents import DEQUANTISE, LOOK_UP, product_types, steps
from castling_deploy.export.coreml_program import exported_program
from castling_deploy.export.mil_evaluator import load_program
from castling_deploy.export.mil_package import Package, read_package
from castling_deploy.export.neural_engine import PADDED, unfit
from castling_deploy.export.scopes import kind
from castling_deploy.export.to_coreml import CoreMLOptions, CoreMLTarget
from castling_deploy.fold import fold
from castling_deploy.int8.held import misheld
from castling_deploy.int8.quantised import quantised
from castling_deploy.target import Network, Precision

FIRST = CoreMLOptions(layout="channels-first")
NETWORKS = [*SMALL, "levit-detector", "deit-segmenter"]
INHERENT = {"deit-distilled": 1, "levit-detector": 8}  # two tokens read one behind the other; boxes by position
B, C, H, W = 2, 6, 4, 5


@cache
def network_named(name: str) -> Network:
    if name in SMALL:
        return folded_network(name, batch=2)
    module = dense(name)
    size: tuple[int, int] = module.config.image_size  # type: ignore[union-attr, assignment]
    inputs = (replace(folded_network("deit").inputs[0], shape=(2, 3, *size)),)
    return replace(folded_network("deit"), module=fold(castle(module)), inputs=inputs)


def in_float64(module: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = copy.deepcopy(module).double()(x.double())
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def error_of(module: nn.Module, exact: nn.Module, x: Tensor) -> float:
    pairs = list(zip(in_float64(module, x), in_float64(exact, x), strict=True))
    assert all(got.shape == wanted.shape for got, wanted in pairs)
    return max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs)


def moved(program: torch.export.ExportedProgram) -> list[Node]:
    """Transpositions of what comes from the image, but for those that products take in."""

    def source(node: Node) -> Node:
        return source(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else node

    permuted = program.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    return [node for node in permuted if not source(node).name.startswith(("p_", "b_"))]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_same_in_float64_and_moves_nothing(name: str) -> None:
    network = network_named(name)
    program = exported_program(network, pixels=False, scores=False, layout="channels-first")
    assert error_of(program.module(check_guards=False), network.module, *network.example()) < 1e-9
    assert len(moved(program)) == INHERENT.get(name, 0)


@pytest.mark.parametrize("name", ["deit", "levit"])
def test_a_norm_over_another_axis_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over heads instead of a head's channels: shapes are right, and numbers are not."""
    right = channels_first._Rewriting._reduce

    def wrong(rewriting: channels_first._Rewriting, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        found = right(rewriting, node, x, args)
        if found is not None and kind(found.node) == "linalg_vector_norm":
            found.node.args = (found.node.args[0], 2, [1], True)
        return found

    monkeypatch.setattr(channels_first._Rewriting, "_reduce", wrong)
    network = network_named(name)
    assert error_of(CoreMLTarget().lowered(network, FIRST), network.module, *network.example()) > 1e-3


# -- one operation after another


class Calls(nn.Module):
    """A function of tokens (B, N, C), which come from a map and are given back as they are or as a map's."""

    def __init__(self, function: Callable[..., Tensor], *weights: int | tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        shapes = [(shape,) if isinstance(shape, int) else shape for shape in weights]
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(2).transpose(1, 2), *self.weights)


def heads(x: Tensor) -> Tensor:
    """(B, N, C) -> (B, 2, N, C / 2)."""
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


# What has a form of its own: nothing is transposed on the way to tokens, maps or rows of channels.
MOVED: dict[str, Calls] = {
    "Linear": Calls(lambda x, w, b: as_map(F.linear(x, w, b)), (8, C), 8),
    "Linear on a map": Calls(lambda x, w: F.linear(x.unflatten(1, (H, W)), w).permute(0, 3, 1, 2), (8, C)),
    "LayerNorm": Calls(lambda x: as_map(F.layer_norm(x, (C,), eps=1e-2))),
    "LayerNorm with affine": Calls(lambda x, w, b: as_map(F.layer_norm(x, (C,), w, b)), C, C),
    "LayerNorm of heads": Calls(
        lambda x, w, b: as_map(F.layer_norm(heads(x), (C // 2,), w, b).transpose(1, 2).flatten(2)), C // 2, C // 2
    ),
    "positions": Calls(lambda x, w: as_map(x + w), (1, H * W, C)),
    "a constant of fewer axes": Calls(lambda x, w: as_map(x * w), C),
    "every second": Calls(lambda x: as_map(x.unflatten(1, (H, W))[:, ::2, ::2].flatten(1, 2), (2, 3))),
    "first tokens": Calls(lambda x: x[:, :4].transpose(1, 2)),
    "one token": Calls(lambda x, w: F.linear(x[:, :1], w), (8, C)),
    "padded tokens": Calls(lambda x: F.pad(x, (0, 0, 2, 1)).transpose(1, 2)),
    "padded channels": Calls(lambda x: F.pad(x, (1, 2), value=3.0).transpose(1, 2)),
    "tokens joined": Calls(lambda x: torch.cat([x, x * 2], 1).transpose(1, 2)),
    "channels joined": Calls(lambda x: torch.cat([x, x * 2], -1).transpose(1, 2)),
    "mean of tokens": Calls(lambda x: x.mean(1)),
    "mean of tokens, kept": Calls(lambda x: as_map(x - x.mean(1, keepdim=True))),
    "softmax over channels": Calls(lambda x: as_map(x.softmax(-1))),
    "token convolution": Calls(
        lambda x, w: as_map(F.conv2d(heads(x), w, None, (1, 1), (4, 0), 1, 2).transpose(1, 2).flatten(2)), (2, 1, 9, 1)
    ),
    "attention": Calls(lambda x: as_map((heads(x) @ heads(x).mT).softmax(-1) @ heads(x), None)),
    "linear attention": Calls(lambda x: as_map(heads(x) @ (heads(x).mT @ heads(x)), None)),
}
# What has none gets its tokens as they were.
LEFT: dict[str, Calls] = {
    "running sums": Calls(lambda x: x.cumsum(1)),
    "a token": Calls(lambda x: x[:, 3]),
    "all in one row": Calls(lambda x: x.flatten(1)),
    "channels and tokens in another grid": Calls(lambda x: x.reshape(B, C, H * W)),
    "LayerNorm of tokens and channels": Calls(lambda x: F.layer_norm(x, (H * W, C))),
    "products of three axes": Calls(lambda x: x.mT @ x),
    "reflected": Calls(lambda x: F.pad(x, (2, 1), mode="reflect")),
    "with a wider one": Calls(lambda x, w: x + w, (3, 1, 1, C)),
}


def as_map(x: Tensor, grid: tuple[int, int] | None = (H, W)) -> Tensor:
    """(B, N, C) -> (B, C, *grid); heads (B, 2, N, D) -> (B, 2 D, N)."""
    return x.transpose(1, 2).unflatten(2, grid) if grid else x.mT.flatten(1, 2)


@pytest.mark.parametrize("name", [*MOVED, *LEFT])
def test_an_operation_on_tokens_is_exact_and_what_has_a_form_moves_nothing(name: str) -> None:
    module, x = {**MOVED, **LEFT}[name], torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = in_channels_first(torch.export.export(module, (x,)).run_decompositions({}))
    assert error_of(program.module(check_guards=False), module, x) < 1e-12
    assert (not moved(program)) == (name in MOVED)


# -- what Core ML is given


def package_of(network: Network, folder: Path, options: CoreMLOptions, precision: Precision) -> Package:
    folder.mkdir(exist_ok=True)
    CoreMLTarget().export(network, precision, options, folder)
    return read_package(folder / "model.mlpackage")


def kinds(package: Package) -> Counter[str]:
    return Counter(operation.type for operation in package.operations)


@pytest.mark.parametrize(("name", "transposed", "linear"), [("levit-linear", 0, 1), ("deit-distilled", 1, 1)])
def test_nothing_is_padded(name: str, transposed: int, linear: int, tmp_path: Path) -> None:
    """Of Linears the head is left, which has no tokens."""
    network = folded_network(name)
    package = package_of(network, tmp_path, FIRST, Precision.FP16)
    assert kinds(package)["reduce_l2_norm"] and not unfit(steps(package))
    assert (kinds(package)["transpose"], kinds(package)["linear"]) == (transposed, linear)
    images = images_for(network, 1)
    wanted, got = logits_of(network, images), load_program(tmp_path / "model.mlpackage")({"image": images})["logits"]
    assert np.abs(np.asarray(got) - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_the_class_token_alone_lies_as_it_was(tmp_path: Path) -> None:
    """Its channels are the last axis: only what picks it, and two norms of it, have an axis of 1 there."""
    package = package_of(folded_network("deit"), tmp_path, FIRST, Precision.FP16)
    assert Counter(one.type for one in package.operations if one.name in unfit(steps(package))[PADDED]) == {
        "slice_by_index": 4,
        "reduce_l2_norm": 2,
        "maximum": 2,
    }
    assert not kinds(package)["transpose"]


def test_what_needs_float32_has_it(tmp_path: Path) -> None:
    """An island's products and a module's norms, by the paths that they had."""
    network = replace(folded_network("deit"), islands=("blocks.0.mlp",), reductions=("blocks.0.norm1",))
    package = package_of(network, tmp_path, FIRST, Precision.FP16)
    wide = Counter(one.type for one in package.operations if one.outputs[0].dtype == "FLOAT32" and one.type != "cast")
    assert wide["conv"] == 2 and wide["gelu"] == 1 and wide["layer_norm"] == 1


@pytest.mark.parametrize("palette", [None, 4])
def test_weights_in_few_bits_stay_in_them(palette: int | None, tmp_path: Path) -> None:
    folded = folded_network("deit")
    paths = [path for path, module in folded.module.named_modules() if isinstance(module, nn.Linear)]
    levels = Quantisation(dict.fromkeys(paths, (0.0, 0.0)), Activations.FLOAT16, palette=palette)
    network = replace(folded, quantisation=levels)
    package = package_of(network, tmp_path, replace(FIRST, palettise=palette), Precision.INT8)
    assert not misheld(CoreMLTarget(), tmp_path, network)
    assert kinds(package)[LOOK_UP if palette else DEQUANTISE] == product_types(package)["int8"] == len(paths)
    images = images_for(network, 1)
    with torch.no_grad():
        wanted = quantised(network.module, levels)(torch.from_numpy(images)).numpy()
    got = load_program(tmp_path / "model.mlpackage")({"image": images})["logits"]
    assert np.abs(np.asarray(got) - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_the_command_exports_and_verifies_it(checkpoint_file: Callable[[str], Path], tmp_path: Path) -> None:
    asked = ("--target", "coreml", "--layout", "channels-first", "--no-benchmark")
    run = castling("export", checkpoint_file("deit"), *asked, "-o", tmp_path, "--json")
    assert run.code == 0, run.err
    (folder,) = tmp_path.iterdir()
    assert '"layout": "channels-first"' in (folder / "manifest.json").read_text()
    assert kinds(read_package(folder / "model.mlpackage"))["transpose"] == 0
    assert castling("verify", folder).code == 0
