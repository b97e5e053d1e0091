"""16-bit activations beside 8-bit weights: every product returns levels, which is what Qualcomm's NPU takes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from exported import CLASSIFIER, exported
from torch import nn

from castling_deploy.eight_bits import BIAS_LEVELS, Activations, Quantisation
from castling_deploy.int8.calibration import MARGIN, calibrated
from castling_deploy.int8.quantised import QuantisedLinear


def test_every_product_in_8_bits_returns_levels() -> None:
    folder = exported(CLASSIFIER, "onnx", "int8", activations="uint16")
    parity = json.loads((folder.path / "parity.json").read_text())
    int8 = parity["int8"]
    assert parity["verdict"] == "pass" and int8["activations"] == "uint16" and not int8["kept_in_float"]
    assert int8["results"].keys() == int8["ranges"].keys() and len(int8["ranges"]) > 30
    model = onnx.load(folder.path / "model.onnx")
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    products = [
        node
        for node in model.graph.node
        if node.op_type in ("Gemm", "MatMul", "Conv")
        and all(name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input)
    ]
    assert len(products) == len(int8["ranges"])
    assert {readers[product.output[0]].op_type for product in products} == {"QuantizeLinear"}
    assert folder.artifact.details["activations"] == ["uint16"] and folder.artifact.details["opset"] == 21


def test_onnx_runtime_rounds_to_16_bits_as_pytorch_does() -> None:
    """As the file is written; by default, ONNX Runtime on a CPU rounds to 8 bits what it multiplies by 8-bit weights,
    and errors are a hundred times as large."""
    import onnxruntime

    folder = exported(CLASSIFIER, "onnx", "int8", activations="uint16")
    pixels = folder.preprocessing.normalised(np.load(folder.path / "golden" / "images.npy"))
    expected = np.load(folder.path / "golden" / "logits.npy")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder.path / "model.onnx", options, providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(None, {"image": image[None]})[0] for image in pixels])
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_range_of_16_bits_leaves_room_for_what_calibration_did_not_see() -> None:
    x = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Linear(16, 8))
    found = calibrated(network, x.numpy(), Activations.UINT16)
    assert found.ranges["0"] == (MARGIN * x.min().item(), MARGIN * x.max().item())
    y = network(x)
    assert found.results["0"] == pytest.approx((MARGIN * y.min().item(), MARGIN * y.max().item()))


def test_what_a_linear_returns_is_a_level() -> None:
    linear, x = nn.Linear(16, 4), torch.randn(8, 16).clamp(-1, 1)
    quantisation = Quantisation({"it": (-1.0, 1.0)}, Activations.UINT16, {"it": (-8.0, 8.0)})
    step = quantisation.result_scale("it")[0]
    y = QuantisedLinear(linear, quantisation, "it")(x)
    torch.testing.assert_close((y / step).round() * step, y)
    free = QuantisedLinear(linear, Quantisation(quantisation.ranges, Activations.UINT16), "it")(x)
    assert 0 < (y - free).abs().max() <= 0.501 * step


@pytest.mark.parametrize("activations", [Activations.UINT8, Activations.UINT16])
def test_a_channel_without_weights_keeps_its_bias(activations: Activations) -> None:
    """As a BatchNorm leaves one whose weight has gone to nothing: in steps of the weights, int32 holds no such bias."""
    linear = nn.Linear(16, 2)
    with torch.no_grad():
        linear.weight[0], linear.bias[0] = 1e-12, 3.0
    quantisation = Quantisation({"it": (-1.0, 1.0)}, activations)
    held = QuantisedLinear(linear, quantisation, "it")
    weight, bias = held.weight.abs().amax(1), held.bias
    assert bias is not None
    assert bias[0].item() == pytest.approx(3.0) and weight[0] <= 1e-12
    steps = np.float32(np.float32(3.0) / (BIAS_LEVELS * quantisation.scale("it")[0])) * quantisation.scale("it")[0]
    assert abs(bias[0].item() / steps) <= 2**31 - 1
