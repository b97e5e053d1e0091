"""The float16 pass: typed by explicit casts, reductions in float32, and no constant silently changed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from folded_networks import folded_network, images_for, logits_of
from onnx.reference import ReferenceEvaluator

from castling_deploy.export import onnx_half
from castling_deploy.export.binary16 import fits
from castling_deploy.export.onnx_half import half
from castling_deploy.export.to_onnx import onnx_model
from castling_deploy.target import Network, Precision

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{body}')


def evaluated(model: onnx.ModelProto, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """By numpy, which rounds every float16 result to float16, as ONNX Runtime on x86 does not."""
    return ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})[0]  # type: ignore[no-any-return]


def types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {tensor.name: tensor.data_type for tensor in graph.initializer} | {
        value.name: value.type.tensor_type.elem_type for value in values
    }


def computed_in(model: onnx.ModelProto, operator: str) -> set[int]:
    known = types(model)
    return {known[name] for node in model.graph.node if node.op_type == operator for name in node.output}


NORM = """norm (float[4, 64] x) => (float[4, 64] y) <int64[1] axes = {1}, float floor = {0.00006103515625}> {
    length = ReduceL2<keepdims = 1>(x, axes)
    clipped = Clip(length, floor)
    y = Div(x, clipped)
}"""


@pytest.fixture(scope="module", params=["deit", "levit"])
def case(request: pytest.FixtureRequest) -> tuple[Network, onnx.ModelProto]:
    network = folded_network(request.param, batch=2)
    return network, onnx_model(network, Precision.FP32, 20)


def test_all_inputs_of_an_operator_have_one_type(case: tuple[Network, onnx.ModelProto]) -> None:
    model = half(case[1])
    known = types(model)
    for node in model.graph.node:
        floats = {known[name] for name in (*node.input, *node.output)} & {FLOAT, HALF}
        assert len(floats) == (2 if node.op_type == "Cast" else 1), node.name


def test_products_are_float16_and_reductions_are_float32(case: tuple[Network, onnx.ModelProto]) -> None:
    model = half(case[1])
    operators = {node.op_type for node in model.graph.node}
    for operator in operators & {"Conv", "Gemm", "MatMul", "Add", "Gelu", "HardSwish"}:
        assert computed_in(model, operator) == {HALF}, operator
    for operator in operators & {"LayerNormalization", "ReduceL2", "ReduceMean", "Softmax", "Clip", "Div"}:
        assert computed_in(model, operator) == {FLOAT}, operator


def test_interface_stays_float32(case: tuple[Network, onnx.ModelProto]) -> None:
    model = half(case[1])
    assert list(model.graph.input) == list(case[1].graph.input)
    assert list(model.graph.output) == list(case[1].graph.output)


def test_no_two_casts_cancel_and_none_is_made_twice(case: tuple[Network, onnx.ModelProto]) -> None:
    model = half(case[1])
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert not {node.input[0] for node in casts} & {node.output[0] for node in casts}
    assert max(Counter((node.input[0], node.attribute[0].i) for node in casts).values()) == 1


def test_every_rounding_to_float16_stays_within_the_gate(case: tuple[Network, onnx.ModelProto]) -> None:
    network, model = case
    images = images_for(network, 2)
    expected = logits_of(network, images)
    spread = np.abs(expected[0] - expected[1]).max()
    error = np.abs(evaluated(half(model), images) - expected).max() / spread
    assert 1e-5 < error < 3e-2


def test_a_norm_whose_square_sum_leaves_float16_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * 1000  # sums of squares of 6e7
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(evaluated(half(parsed(NORM)), x), expected, rtol=2e-3, atol=1e-6)
    monkeypatch.setattr(onnx_half, "REDUCTIONS", frozenset())
    monkeypatch.setattr(onnx_half, "CLOSES_A_NORM", frozenset())
    with np.errstate(all="ignore"):
        assert not np.allclose(evaluated(half(parsed(NORM)), x), expected, rtol=2e-3)


def test_a_norm_between_products_is_one_island_between_two_casts() -> None:
    model = half(
        parsed("""norm (float[64, 64] x) => (float[64, 64] y)
    <int64[1] axes = {1}, float floor = {0.00006103515625}> {
        h = MatMul(x, x)
        length = ReduceL2<keepdims = 1>(h, axes)
        clipped = Clip(length, floor)
        unit = Div(h, clipped)
        y = MatMul(unit, x)
    }""")
    )
    assert [node.op_type for node in model.graph.node] == [
        "Cast",
        "MatMul",
        "Cast",
        "ReduceL2",
        "Clip",
        "Div",
        "Cast",
        "MatMul",
        "Cast",
    ]


@pytest.mark.parametrize("constant", ["0.000001", "100000.0"])
def test_a_constant_outside_float16_keeps_its_operator_in_float32(constant: str) -> None:
    model = half(
        parsed(f"""g (float[4] x) => (float[4] y) <float c = {{{constant}}}, float d = {{0.5}}> {{
        a = Mul(x, c)
        y = Mul(a, d)
    }}""")
    )
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert constants["c"] == np.float32(constant)
    assert constants["d_fp16"].dtype == np.float16
    assert types(model)["a"] == FLOAT


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ([0.0, 0.0], True),
        ([0.1, -3.0], True),
        ([65504.0, 1.0], True),
        ([2.0**-14], True),
        ([65536.0, 1.0], False),
        ([2.0**-15], False),
        ([np.nan], False),
        ([np.inf], False),
        ([1.0, 1e-7], True),
        ([6.2e-5] + [2.1e-8] * 10**6, False),
    ],
)
def test_float16_holds_a_constant_only_to_its_precision(values: list[float], held: bool) -> None:
    assert fits(np.array(values, np.float32)) is held


def test_an_operator_that_has_no_float16_form_stays_float32() -> None:
    model = half(
        parsed("""g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[4] s = {1, 1, 2, 2}> {
        a = Add(x, x)
        y = Resize<mode = "nearest">(a, , s)
    }""")
    )
    assert {tensor.name: tensor.data_type for tensor in model.graph.initializer} == {"s": FLOAT}
    assert types(model)["y_fp16"] == HALF
