"""The ONNX target: a clean, self-contained, reproducible graph that ONNX Runtime computes as PyTorch does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from folded_networks import folded_network, images_for, logits_of, network_of
from torch import nn

from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.to_onnx import OnnxTarget, check, onnx_model
from castling_deploy.target import Artifact, Network, Precision, WitnessKind

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Exported:
    network: Network
    precision: Precision
    folder: Path
    artifact: Artifact

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"


CASES = [("deit-distilled", Precision.FP32), ("levit", Precision.FP32), ("levit", Precision.FP16)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, precision = request.param
    network, folder = folded_network(name, batch=2), tmp_path_factory.mktemp("onnx")
    return Exported(network, precision, folder, OnnxTarget().export(network, precision, OnnxOptions(), folder))


def test_onnx_runtime_computes_what_pytorch_computes(exported: Exported) -> None:
    images = images_for(exported.network, 2)
    expected = logits_of(exported.network, images)
    with OnnxTarget().load(exported.folder) as session:
        actual = session({"image": images})["logits"]
    spread = np.abs(expected[0] - expected[1]).max()
    limit = 1e-4 if exported.precision is Precision.FP32 else 3e-2
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() < limit * spread


def test_file_is_valid_and_self_contained(exported: Exported) -> None:
    assert exported.artifact.files == ("model.onnx",)
    assert list(exported.folder.iterdir()) == [exported.path]
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert not model.functions


def test_interface_is_the_one_that_was_promised(exported: Exported) -> None:
    graph, artifact = onnx.load(exported.path).graph, exported.artifact
    for spec, value in zip((*artifact.inputs, *artifact.outputs), (*graph.input, *graph.output), strict=True):
        tensor = value.type.tensor_type
        assert (spec.name, spec.shape) == (value.name, tuple(axis.dim_value for axis in tensor.shape.dim))
        assert tensor.elem_type == onnx.TensorProto.FLOAT


def test_graph_holds_the_attention_and_nothing_beside_it(exported: Exported) -> None:
    nodes = Counter(node.op_type for node in onnx.load(exported.path).graph.node)
    levit = exported.network.name == "levit"
    norms = 3 * (3 if levit else 2)  # of q, k and the output
    if exported.precision is Precision.FP16:
        assert nodes["ReduceL2"] == nodes["Clip"] == nodes["Div"] == norms
    else:
        assert nodes["LpNormalization"] == norms and not nodes.keys() & {"ReduceL2", "Clip", "Div"}
    assert nodes["Softmax"] == (2 if levit else 0)  # the two downsamplings keep theirs
    assert not nodes.keys() & {"BatchNormalization", "Identity", "Dropout", "Expand", "Tile", "Squeeze", "Shape"}
    assert ("Cast" in nodes) == (exported.precision is Precision.FP16)
    assert exported.artifact.details["nodes"] == nodes


def test_nodes_are_named_after_their_modules(exported: Exported) -> None:
    names = [node.name for node in onnx.load(exported.path).graph.node]
    attention = "stages.0.blocks.0.attn" if exported.network.name == "levit" else "blocks.0.attn"
    assert any(name.startswith(f"{attention}.query/MatMul_") for name in names)
    assert len(set(names)) == len(names)


def test_description_travels_inside_and_nothing_of_this_machine_does(exported: Exported) -> None:
    data = exported.path.read_bytes()
    model = onnx.load_from_string(data)
    assert model.doc_string == exported.network.description
    assert exported.network.metadata.items() <= {entry.key: entry.value for entry in model.metadata_props}.items()
    for trace in (".py", "site-packages", "File ", "torch.nn", str(Path.home()), str(Path.cwd())):
        assert trace.encode() not in data


@pytest.mark.slow
def test_same_network_gives_the_same_bytes_in_another_process(exported: Exported, tmp_path: Path) -> None:
    code = f"""
import sys; from pathlib import Path; sys.path.insert(0, {str(TESTS)!r})
from folded_networks import folded_network
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.to_onnx import OnnxTarget, Precision
network = folded_network({exported.network.name!r}, 2)
OnnxTarget().export(network, Precision({exported.precision.value!r}), OnnxOptions(), Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (tmp_path / "model.onnx").read_bytes() == exported.path.read_bytes()


def test_witness_is_the_runtime_and_honours_the_threads(exported: Exported) -> None:
    with OnnxTarget().load(exported.folder, threads=3) as session:
        assert session.witness == OnnxTarget().witness()
        options = session._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert session.witness.kind is WitnessKind.RUNTIME


def test_half_of_the_bytes_are_left_in_fp16(exported: Exported) -> None:
    model = onnx.load(exported.path)
    weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    if exported.precision is Precision.FP16:
        assert weights == {onnx.TensorProto.FLOAT16}
        assert exported.artifact.details["products"].keys() == {"fp16"}
    else:
        assert weights == {onnx.TensorProto.FLOAT}
        assert exported.artifact.details["products"].keys() == {"fp32"}


def test_dynamic_batch_runs_at_any_size(tmp_path: Path) -> None:
    network = folded_network("deit", batch=1)
    artifact = OnnxTarget().export(network, Precision.FP32, OnnxOptions(dynamic=True), tmp_path)
    assert artifact.inputs[0].shape == (-1, 3, 32, 32)
    assert artifact.outputs[0].shape == (-1, 10)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}
    with OnnxTarget().load(tmp_path) as session:
        for batch in (1, 2, 5):
            images = images_for(network, batch)
            np.testing.assert_allclose(session({"image": images})["logits"], logits_of(network, images), atol=1e-4)


@pytest.mark.parametrize("opset", [20, 25])
def test_opset_is_the_one_that_was_asked_for(opset: int) -> None:
    assert onnx_model(folded_network("deit"), Precision.FP32, opset).opset_import[0].version == opset


@pytest.mark.parametrize(("opset", "reason"), [(17, "GELU"), (19, "GELU"), (26, "no newer")])
def test_other_opsets_are_refused_with_the_reason(opset: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        OnnxOptions(opset=opset)


def test_a_file_that_torch_leaves_at_another_opset_is_refused() -> None:
    with pytest.raises(ExportError, match="18} where 26 was asked for"):
        onnx_model(folded_network("deit"), Precision.FP32, 26)


class Tail(nn.Module):
    """A convolution, and something after it."""

    def __init__(self, *tail: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 10, 8), *tail)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image).flatten(1)  # type: ignore[no-any-return]


class DataDependent(Tail):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image if image.sum() > 0 else -image)


def test_a_batchnorm_that_was_not_folded_is_refused() -> None:
    network = network_of(Tail(nn.Hardswish(), nn.BatchNorm2d(10)).eval(), (8, 8))
    with pytest.raises(ExportError, match="BatchNormalization"):
        onnx_model(network, Precision.FP32, 20)


def test_a_softmax_that_the_network_does_not_have_is_refused() -> None:
    model = onnx_model(network_of(Tail(nn.Softmax(1)).eval(), (8, 8)), Precision.FP32, 20)
    check(model, Precision.FP32, softmaxes=1)
    with pytest.raises(ExportError, match="1 Softmax where the network has 0"):
        check(model, Precision.FP32, softmaxes=0)


def test_a_float32_graph_does_not_pass_for_float16() -> None:
    model = onnx_model(network_of(Tail().eval(), (8, 8)), Precision.FP32, 20)
    with pytest.raises(ExportError, match="fp16"):
        check(model, Precision.FP16, softmaxes=0)


def test_what_torch_cannot_export_is_an_export_error() -> None:
    with pytest.raises(ExportError, match=r"torch\.export"):
        onnx_model(network_of(DataDependent().eval(), (8, 8)), Precision.FP32, 20)


@pytest.mark.parametrize("content", [None, b"no model"])
def test_a_missing_or_broken_file_is_an_export_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.onnx"), OnnxTarget().load(tmp_path):
        pass


def test_importing_the_targets_imports_no_toolchain() -> None:
    code = (
        "import sys, castling_deploy.export.to_onnx, castling_deploy.export.to_tensorrt as to_tensorrt\n"
        "to_tensorrt.TensorRTTarget().witness()\n"
        "print({'torch', 'onnx', 'onnxscript', 'onnxruntime', 'numpy', 'tensorrt_rtx'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
