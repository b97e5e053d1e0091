"""Weights alone in levels, in 4 bits with a scale for every 32 of a row, or in 8: what the files hold and compute."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import CLASSIFIER, exported
from torch import nn

from castling_deploy.eight_bits import GROUP, Activations, Quantisation, weight_groups, weight_levels
from castling_deploy.errors import UsageError
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.pte_contents import pte_contents
from castling_deploy.export.xnnpack_payload import read_payload
from castling_deploy.int8.quantised import QuantisedLinear
from castling_deploy.palette import packed
from castling_deploy.target import options_for, target_named

MODEL = "castling-deit-digits"  # the inputs of all its Linears come in groups
WEIGHT = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).numpy()


def test_a_group_has_the_scale_that_loses_least() -> None:
    levels, scales = weight_groups(WEIGHT)
    assert levels.min() >= -8 and levels.max() <= 7 and scales.shape == (24, 3)
    np.testing.assert_array_equal(scales, torch.from_numpy(scales).bfloat16().float().numpy())
    error = np.square(levels * np.repeat(scales, GROUP, 1) - WEIGHT).mean()
    largest = np.abs(WEIGHT.reshape(24, 3, GROUP)).max(2)[..., None] / 7
    plain = np.square(np.round(WEIGHT.reshape(24, 3, GROUP) / largest) * largest - WEIGHT.reshape(24, 3, GROUP)).mean()
    assert error < 0.95 * plain


def test_a_group_of_zeros_is_zeros() -> None:
    levels, scales = weight_groups(np.zeros((2, 64), np.float32))
    assert not levels.any() and (scales > 0).all()


def test_weights_whose_inputs_make_no_groups_stay_in_8_bits() -> None:
    form = Quantisation({"it": (0.0, 0.0)}, Activations.FLOAT32, weight_bits=4)
    for inputs, expected in ((96, weight_groups), (80, weight_levels)):
        linear = nn.Linear(inputs, 4)
        levels, scales = map(torch.from_numpy, expected(linear.weight.detach().numpy()))
        weight = levels * scales.reshape(4, -1).repeat_interleave(GROUP if inputs == 96 else inputs, 1)
        x = torch.randn(3, inputs)
        torch.testing.assert_close(QuantisedLinear(linear, form, "it")(x), nn.functional.linear(x, weight, linear.bias))


def test_two_levels_share_a_byte_the_first_below() -> None:
    levels = np.array([[-8, 7, 0, -1]], np.int8)
    tensor = onnx.helper.make_tensor("it", onnx.TensorProto.INT4, levels.shape, packed(levels, 4).tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), levels)
    assert packed(levels + 8, 4).tolist() == [0 | 15 << 4, 8 | 7 << 4]


@pytest.mark.parametrize(
    ("options", "dtypes"), [({"weight_bits": 4}, ["int4"]), ({"activations": "float32"}, ["int8"])]
)
def test_onnx_holds_and_computes_what_the_network_does(options: dict[str, object], dtypes: list[str]) -> None:
    """As the file is written: by default, ONNX Runtime rounds activations to 8 bits for such products."""
    folder = exported(MODEL, "onnx", "int8", **options)
    parity = json.loads((folder.path / "parity.json").read_text())
    linears = parity["int8"]["ranges"]
    assert parity["verdict"] == "pass" and parity["accuracy"]["artifact"] >= parity["accuracy"]["reference"] - 0.5
    assert parity["int8"]["activations"] == "float32" and "head" in linears and not parity["int8"]["results"]
    details = folder.artifact.details
    assert details["weights"] == dtypes and "activations" not in details
    assert details["products"]["int8"] == len(linears) > 30
    sessions = onnxruntime.SessionOptions()
    sessions.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder.path / "model.onnx", sessions, providers=["CPUExecutionProvider"])
    images = folder.preprocessing.normalised(np.load(folder.path / "golden" / "images.npy"))
    logits = np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])
    expected = np.load(folder.path / "golden" / "logits.npy")
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()


def test_onnx_runtime_multiplies_by_weights_as_they_are_stored(tmp_path: object) -> None:
    folder = exported(MODEL, "onnx", "int8", weight_bits=4)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimised.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(folder.path / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert nodes["MatMulNBits"] == folder.artifact.details["products"]["int8"] - 1  # all but the head, a Gemm
    int8 = exported(MODEL, "onnx", "int8").path / "model.onnx"
    assert (folder.path / "model.onnx").stat().st_size < 0.6 * int8.stat().st_size


def test_xnnpack_takes_the_whole_network_and_4_bits_of_what_comes_in_groups() -> None:
    folder = exported(CLASSIFIER, "executorch", "int8", weight_bits=4)
    parity = json.loads((folder.path / "parity.json").read_text())
    assert parity["verdict"] == "pass" and parity["accuracy"]["artifact"] >= parity["accuracy"]["reference"] - 0.5
    assert (folder.artifact.details["delegates"], folder.artifact.details["outside"]) == (1, {})
    four, eight = (
        read_payload(pte_contents((made.path / "model.pte").read_bytes()).payloads[0][1])
        for made in (folder, exported(CLASSIFIER, "executorch", "int8"))
    )
    assert four.products["int8"] == eight.products["int8"] == len(parity["int8"]["ranges"]) > 20
    halved = 2 * four.constant_bytes["int4"]
    assert halved + four.constant_bytes["int8"] == eight.constant_bytes["int8"] and halved > four.constant_bytes["int8"]


@pytest.mark.parametrize("options", [{"weight_bits": 3}, {"weight_bits": 4, "activations": "uint8"}])
def test_other_bits_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="weights of"):
        OnnxOptions(**options)  # type: ignore[arg-type]


def test_the_form_of_levels_is_that_of_the_options() -> None:
    def form(target: str, **asked: object) -> tuple[Activations, int, int | None]:
        found: Quantisation = options_for(target_named(target), asked).form
        return found.activations, found.weight_bits, found.palette

    assert form("onnx") == (Activations.UINT8, 8, None)
    assert form("onnx", activations="uint16") == (Activations.UINT16, 8, None)
    assert form("onnx", weight_bits=4) == (Activations.FLOAT32, 4, None)
    assert form("executorch", weight_bits=4) == (Activations.PER_TOKEN, 4, None)
    assert form("tensorrt") == (Activations.INT8, 8, None)
    for target in ("coreml", "coreai"):
        assert form(target, palettise=6) == (Activations.FLOAT16, 8, 6)
