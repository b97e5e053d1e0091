"""What the ONNX graph loses on its way to the file, and that it computes the same without."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from folded_networks import folded_network
from networks import SMALL
from onnx_numbers import exactly, unoptimised

from castling_deploy.export.onnx_types import inferred
from castling_deploy.export.onnx_unbatched import unbatched
from castling_deploy.export.to_onnx import exported_program, onnx_model, translated
from castling_deploy.target import Network, Precision


@cache
def traced(name: str) -> bytes:
    network = folded_network(name)
    return translated(exported_program(network, dynamic=False), network, 20).SerializeToString()


def as_traced(network: Network) -> onnx.ModelProto:
    return onnx.load_from_string(traced(network.name))


@pytest.mark.parametrize("name", SMALL)
def test_losing_the_axis_of_one_changes_no_number(name: str) -> None:
    network = folded_network(name)
    before, after = as_traced(network), inferred(unbatched(as_traced(network)))
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(unoptimised(after, network), unoptimised(before, network), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["deit", "levit"])
def test_losing_the_axis_is_exact_in_float64(name: str) -> None:
    network = folded_network(name)
    outputs = [exactly(model, network) for model in (as_traced(network), inferred(unbatched(as_traced(network))))]
    assert outputs[0].dtype == np.float64
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-12, atol=1e-13)


def test_onnx_runtime_gets_linears_without_reshapes_and_products_without_transpositions(tmp_path: Path) -> None:
    network = folded_network("deit")
    model = onnx_model(network, Precision.FP32, 20)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    blocks, linears = 2, 2 * 6 + 1
    assert nodes["Gemm"] == linears and nodes["MatMul"] == 0
    assert nodes["FusedMatMul"] == 2 * blocks  # the transpositions of q and k are inside
    assert nodes["Transpose"] == 2 * blocks + 1  # of the values and of the result; of the patches
    # q, k, v and the result change shape, the values twice more for the convolution; the patches, the head's token; the
    # last block is computed for one token, which keeps its axis: a Gemm on one row is between two reshapes
    assert nodes["Reshape"] <= 6 * blocks + 3 + 2 * 4 + 1
    assert nodes["Cast"] == 0


def test_convolutions_between_convolutions_keep_their_axis() -> None:
    network = folded_network("levit")
    for node in onnx_model(network, Precision.FP32, 20).graph.node:
        if node.op_type == "HardSwish" and node.name.startswith("stem"):
            assert all(not name.endswith("/row") for name in node.input)


def test_a_batch_of_two_keeps_its_axis() -> None:
    network = folded_network("deit", 2)
    shapes = {
        len(value.type.tensor_type.shape.dim) for value in onnx_model(network, Precision.FP32, 20).graph.value_info
    }
    assert shapes >= {3, 4}
