"""Weights in 8 bits are read back from the files: what the outputs are too few to tell fails by the module's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from deployments import castling
from edits import reseal
from exported import CLASSIFIER, copied, exported
from folded_networks import network_of
from torch import nn

from castling_deploy import bundled, eight_bits
from castling_deploy.errors import ExportError
from castling_deploy.export import to_onnx, torch_palette
from castling_deploy.int8.held import misheld, same
from castling_deploy.making import exported as exported_here
from castling_deploy.request import Step
from castling_deploy.target import Network, Precision, Target, TensorSpec, options_for, target_named

Made = tuple[np.ndarray, np.ndarray]  # levels and scales, or indices and a table
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx": ("onnx", {}),
    "onnx, uint16": ("onnx", {"activations": "uint16"}),
    "onnx, 4 bits": ("onnx", {"weight_bits": 4}),
    "tensorrt": ("tensorrt", {}),
    "coreml": ("coreml", {}),
    "coreml, tables": ("coreml", {"palettise": 4}),
    "coreai": ("coreai", {}),
    "coreai, tables": ("coreai", {"palettise": 6}),
    "executorch, 4 bits": ("executorch", {"weight_bits": 4}),  # and 8 where inputs are no multiple of 32
}
MAKERS: tuple[tuple[ModuleType, str], ...] = (
    (eight_bits, "weight_levels"),
    (eight_bits, "weight_groups"),
    (torch_palette, "palettised"),
)
WIDTHS = (32, 32, 48, 48, 64, 32, 32)
QUERY = "stages.0.blocks.0.attn.query"
IN_8_BITS = [str(number) for number in range(5)]  # the last Linear stays in float


def along_the_wrong_axis(make: Callable[..., Made], weight: np.ndarray, *others: Any) -> Made:
    numbers, scales = make(np.ascontiguousarray(weight.T), *others)
    return np.ascontiguousarray(numbers.T), scales


def doubled(make: Callable[..., Made], *given: Any) -> Made:
    numbers, scales = make(*given)
    return numbers, 2 * scales


def with_rows_swapped(make: Callable[..., Made], *given: Any) -> Made:
    numbers, scales = make(*given)
    return numbers[[1, 0, *range(2, len(numbers))]], scales


DEFECTS = {"0": along_the_wrong_axis, "1": doubled, "2": along_the_wrong_axis, "3": with_rows_swapped}  # by module


@pytest.fixture(scope="module")
def linears() -> Network:
    """Linears on 16 tokens, some of them square."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(*sizes) for sizes in pairwise(WIDTHS))).eval()
    given, made = (TensorSpec(name, (1, 16, 32), "float32", "NTC") for name in ("image", "logits"))
    return replace(network_of(module, (16, 32)), inputs=(given,), outputs=(made,), part=True)


def in_8_bits(linears: Network, name: str) -> tuple[Target, Any, Network]:
    """The target, its options, and the network as it is written with them."""
    target = target_named(FORMS[name][0])
    options = options_for(target, FORMS[name][1])
    ranges = dict.fromkeys(IN_8_BITS, (-2.0, 3.0))
    results = ranges if options.form.activations.returned else {}
    return target, options, replace(linears, quantisation=replace(options.form, ranges=ranges, results=results))


def weight_of(network: Network, path: str) -> np.ndarray:
    weight: np.ndarray = network.module.get_submodule(path).weight.detach().numpy()  # type: ignore[operator, union-attr]
    return weight


def make_wrong(patched: pytest.MonkeyPatch, weights: Mapping[str, np.ndarray]) -> None:
    """Let the exporters do to these weights what DEFECTS has for them."""

    def wrong(make: Callable[..., Made]) -> Callable[..., Made]:
        def maker(weight: np.ndarray, *others: Any) -> Made:
            (path,) = (path for path, own in weights.items() if np.array_equal(own, weight))
            return DEFECTS[path](make, weight, *others) if path in DEFECTS else make(weight, *others)

        return maker

    for module, function in MAKERS:
        patched.setattr(module, function, wrong(getattr(module, function)))


@pytest.mark.parametrize("name", FORMS)
def test_every_module_that_is_stored_wrongly_is_named_and_no_other(
    name: str, linears: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, options, network = in_8_bits(linears, name)
    weights = {path: weight_of(network, path) for path in IN_8_BITS}
    with monkeypatch.context() as patched:
        make_wrong(patched, weights)
        target.export(network, Precision.INT8, options, tmp_path)
    found = misheld(target, tmp_path, network)
    named = [each for each in found if each.startswith("the file does not hold ")]
    defects = [path for path, defect in DEFECTS.items() if "tables" not in name or defect is not along_the_wrong_axis]
    assert named == [f"the file does not hold {path}.weight as the network in 8 bits has it" for path in defects]
    strays = [each for each in found if each.endswith(" are none of the network's")]
    assert named + strays == list(found)
    for shape in {weights[path].shape for path in defects}:  # each is in the file, as something else
        count = sum(weights[path].shape == shape for path in defects)
        assert strays.count(f"numbers of shape {shape} in the file's 8 bits are none of the network's") == count


def test_an_export_that_stores_a_weight_wrongly_is_rejected(
    linears: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, options, network = in_8_bits(linears, "onnx")
    step, few = Step(target, Precision.INT8, options), np.ones((1, 16, 32), np.float32)
    exported_here(step, network, tmp_path, few)
    in_levels = to_onnx.in_8_bits
    monkeypatch.setattr(to_onnx, "in_8_bits", lambda *given: with_scales_doubled(in_levels(*given), "1"))
    with pytest.raises(ExportError, match=r"does not hold 1\.weight"):
        exported_here(step, network, tmp_path, few)


def with_scales_doubled(model: onnx.ModelProto, path: str) -> onnx.ModelProto:
    product = next(node for node in model.graph.node if node.name.startswith(f"{path}/"))
    (made,) = (node for node in model.graph.node if product.input[1] in node.output)
    (scales,) = (tensor for tensor in model.graph.initializer if tensor.name == made.input[1])
    scales.CopyFrom(onnx.numpy_helper.from_array(np.float32(2) * onnx.numpy_helper.to_array(scales), scales.name))
    return model


def test_a_weight_may_differ_by_the_rounding_of_its_scales_and_no_more() -> None:
    generator = np.random.default_rng(0)
    levels = generator.integers(-127, 128, (64, 48)).astype(np.float32)
    scales = (10 ** generator.uniform(-7, 1, (64, 1))).astype(np.float32)  # some below float16's normal range
    expected = levels * scales
    assert same(expected, expected)
    half = levels.astype(np.float16) * scales.astype(np.float16)
    assert same(half, expected) and not np.array_equal(half, expected)
    assert not same(half.astype(np.float32), expected)
    largest = np.unravel_index(np.abs(expected).argmax(), expected.shape)
    for written in (half, expected):
        wrong = written.copy()
        wrong[largest] *= 1 + 4 * np.finfo(written.dtype).eps
        assert not same(wrong, expected)
    assert not same(np.where(levels == levels[40, 3], np.nan, expected), expected)
    assert not same(expected.T, expected) and not same(expected[:-1], expected)


def test_one_small_weight_that_parity_does_not_see_fails_verify_with_the_checkpoint(tmp_path: Path) -> None:
    """A query's scales, doubled: behind its norm, they hardly matter."""
    path = copied(exported(CLASSIFIER, "onnx", "int8"), tmp_path)
    onnx.save(with_scales_doubled(onnx.load(path / "model.onnx"), QUERY), path / "model.onnx")
    reseal(path)
    assert castling("verify", path).code == 0
    run = castling("verify", path, "--checkpoint", bundled.checkpoint_path(CLASSIFIER))
    assert run.code == 3 and f"does not hold {QUERY}.weight" in run.out + run.err
