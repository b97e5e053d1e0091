"""float16 that overflows between two operators is seen on x86 too, where ONNX Runtime alone does not see it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from castling_deploy.errors import ExportError
from castling_deploy.export.onnx_stored import StoredSession, witness


def written(path: Path, first: float) -> Path:
    """y = 1e-3 * (first * x): in between stands 4 * 100 * first."""
    constants = {"a": np.full((4, 4), first, np.float16), "b": np.full((4, 4), 1e-3, np.float16)}
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "a"], ["large"]),
        helper.make_node("MatMul", ["large", "b"], ["small"]),
        helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def test_an_overflow_between_two_operators_is_seen(tmp_path: Path) -> None:
    path, image = written(tmp_path / "model.onnx", 300), {"x": np.full((1, 4), 100, np.float32)}
    (alone,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, image)
    assert np.isinf(StoredSession(path, witness())(image)["y"]).all()
    assert np.isfinite(alone).all(), "ONNX Runtime keeps float16 now: this witness is not needed any more"


def test_what_fits_is_only_rounded(tmp_path: Path) -> None:
    path, image = written(tmp_path / "model.onnx", 3), {"x": np.full((1, 4), 100, np.float32)}
    np.testing.assert_allclose(StoredSession(path, witness())(image)["y"], 4.8, rtol=2e-3)


def test_a_damaged_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"does not load model\.onnx"):
        StoredSession(tmp_path / "model.onnx", witness())
