"""LpNormalization stands for what it computes, and for nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from castling_deploy.export.onnx_norms import with_lp_norms

GRAPH = """
    <ir_version: 10, opset_import: ["" : 20]>
    norms (float[5, 3, 8] x) => (float[5, 3, 8] y)
    <int64[1] axes = {{{axis}}}, float floor = {{{floor}}}>
    {{
        length = ReduceL2<keepdims = 1>(x, axes)
        clipped = Clip(length, floor)
        {division}
    }}
"""


def graph(axis: int = -1, floor: str = "1e-12", division: str = "y = Div(x, clipped)") -> onnx.ModelProto:
    model = onnx.parser.parse_model(GRAPH.format(axis=axis, floor=floor, division=division))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_it_computes_the_same_and_zeros_stay_zeros(axis: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
    x[0], x[1] = 0.0, x[1] * 1e-9
    fused = with_lp_norms(graph(axis))
    assert Counter(node.op_type for node in fused.graph.node) == {"LpNormalization": 1}
    assert not fused.graph.initializer
    y = run(fused, x)
    np.testing.assert_allclose(y, run(graph(axis), x), rtol=1e-6, atol=1e-7)
    assert not y[0].any() and np.abs(y[1]).max() > 0.1


@pytest.mark.parametrize(
    "model",
    [
        graph(floor="0.5"),  # a guard that ordinary vectors feel
        graph(division="z = Div(x, clipped)\ny = Mul(z, length)"),
        graph(division="z = Neg(x)\ny = Div(z, clipped)"),
        graph(division="y = Mul(x, clipped)"),
    ],
    ids=["large guard", "the length is read too", "another numerator", "no division"],
)
def test_what_is_no_norm_stays(model: onnx.ModelProto) -> None:
    before = [node.op_type for node in model.graph.node]
    assert [node.op_type for node in with_lp_norms(model).graph.node] == before
