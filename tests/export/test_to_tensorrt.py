"""The TensorRT target: a strongly typed graph always, an engine where a builder is, a named reason where none is."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from folded_networks import folded_network, images_for, logits_of

from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export import tensorrt_build, tensorrt_session
from castling_deploy.export.to_onnx import onnx_model
from castling_deploy.export.to_tensorrt import TensorRTOptions, TensorRTTarget, builder, built_engine, engine_session
from castling_deploy.target import Artifact, Missing, Network, Precision, WitnessKind

TESTS = Path(__file__).parents[1]
RTX = "tensorrt_rtx"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec(RTX) is None, reason="tensorrt-rtx is not installed")
without_gpu = pytest.mark.skipif(tensorrt_build.gpu_present(), reason="for machines without a GPU")


@dataclass(frozen=True)
class Exported:
    network: Network
    precision: Precision
    folder: Path
    artifact: Artifact


CASES = [("deit", Precision.FP16), ("levit", Precision.FP16), ("deit", Precision.FP32)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, precision = request.param
    network, folder = folded_network(name, batch=2), tmp_path_factory.mktemp("tensorrt")
    return Exported(network, precision, folder, TensorRTTarget().export(network, precision, TensorRTOptions(), folder))


def written(body: str, path: Path, opset: int = 20) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{body}')
    path.write_bytes(model.SerializeToString())
    return path


@needs_rtx
@without_gpu
def test_an_engine_is_built_without_a_gpu(exported: Exported) -> None:
    artifact = exported.artifact
    assert artifact.unfinished is None
    assert artifact.files == ("model.onnx", "model.engine")
    assert artifact.loads_with == (RTX, "onnxruntime")
    assert artifact.tools[RTX] == importlib.metadata.version("tensorrt-rtx")
    assert artifact.details["engine_bytes"] == (exported.folder / "model.engine").stat().st_size


@needs_rtx
def test_engine_multiplies_in_the_precision_that_was_asked_for(exported: Exported) -> None:
    details = exported.artifact.details
    assert details["engine_products"] == details["products"]
    assert details["engine_products"].keys() == {exported.precision.value}


def test_graph_is_the_one_that_the_onnx_target_writes(exported: Exported) -> None:
    written = onnx.load(exported.folder / "model.onnx")
    assert written.graph == onnx_model(exported.network, exported.precision, 20).graph


@needs_rtx
def test_engine_is_the_bare_plan_and_the_same_every_time(exported: Exported, tmp_path: Path) -> None:
    plan = (exported.folder / "model.engine").read_bytes()
    trt = importlib.import_module(RTX)
    assert tensorrt_build.build(trt, exported.folder / "model.onnx", tmp_path / "again.engine").keys() == {"built"}
    assert (tmp_path / "again.engine").read_bytes() == plan
    assert plan[1:4] == b"trt"


@without_gpu
def test_without_a_gpu_onnx_runtime_is_a_reference_for_the_typed_graph(exported: Exported) -> None:
    images = images_for(exported.network, 2)
    expected = logits_of(exported.network, images)
    with TensorRTTarget().load(exported.folder) as session:
        assert session.witness == TensorRTTarget().witness()
        assert session.witness.kind is WitnessKind.REFERENCE
        error = np.abs(session({"image": images})["logits"] - expected).max()
    assert error < (1e-4 if exported.precision is Precision.FP32 else 3e-2) * np.abs(expected[0] - expected[1]).max()


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorrt_rtx":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
sys.modules["tensorrt"] = None    # torch looks for this one itself, and does not expect the look to raise
"""


def test_without_tensorrt_the_graph_is_kept_and_the_rest_is_said(tmp_path: Path) -> None:
    code = f"""{BLOCKED}
sys.path.insert(0, {str(TESTS)!r})
import json
from pathlib import Path
from folded_networks import folded_network, images_for
from castling_deploy.export.to_tensorrt import TensorRTOptions, TensorRTTarget, Precision
target, folder, network = TensorRTTarget(), Path({str(tmp_path)!r}), folded_network("deit")
artifact = target.export(network, Precision.FP16, TensorRTOptions(), folder)
with target.load(folder) as session:
    shape = session({{"image": images_for(network, 1)}})["logits"].shape
print(json.dumps([target.missing(), artifact.files, shape, vars(artifact.unfinished), vars(target.unfinished())]))
"""
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    missing, files, shape, artifact_needs, target_needs = json.loads(child.stdout.splitlines()[-1])
    assert missing is None
    assert files == ["model.onnx"]
    assert shape == [1, 10]
    assert artifact_needs == target_needs
    assert artifact_needs["reason"] == "tensorrt is not installed; tensorrt_rtx is not installed"
    for line in (
        "pip install 'castling-deploy[tensorrt-rtx]'",
        "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped",
        "tensorrt_rtx --onnx=model.onnx --saveEngine=model.engine",
    ):
        assert line in artifact_needs["fix"]


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which modules are found before the installed ones, here and in child processes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@without_gpu
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11"),
        ("class NetworkDefinitionCreationFlag: EXPLICIT_BATCH = 0\n__version__ = '8.6.1'", "8.6.1 is too old"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("raise SystemError('initialization of tensorrt_rtx failed')", "ended with exit code 1: SystemError"),
    ],
)
def test_a_broken_tensorrt_is_a_reason_and_no_crash(source: str, reason: str, shadowed: Path) -> None:
    (shadowed / f"{RTX}.py").write_text(source)
    found = builder()
    assert isinstance(found, Missing)
    assert reason in found.reason


@needs_rtx
@without_gpu
def test_tensorrt_without_a_gpu_gives_way_to_tensorrt_rtx(shadowed: Path) -> None:
    (shadowed / "tensorrt.py").write_text("")
    assert builder() == RTX


@needs_rtx
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("g (float[3, 3] x) => (float y) { [the_node] y = Det(x) }", r"Det node 'the_node' \(UNSUPPORTED_NODE\)"),
        (
            "g (float[3, 3] x, float16[3, 3] w) => (float[3, 3] y) { [the_node] y = MatMul(x, w) }",
            r"MatMul node 'the_node' .* must have same input types",
        ),
    ],
)
def test_what_the_parser_refuses_is_named(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        built_engine(RTX, written(body, tmp_path / "model.onnx"), tmp_path / "model.engine")
    assert not (tmp_path / "model.engine").exists()


def test_a_crash_of_the_builder_is_an_export_error(shadowed: Path) -> None:
    (shadowed / f"{RTX}.py").write_text("import ctypes\n__getattr__ = lambda name: ctypes.string_at(0)\n")
    with pytest.raises(ExportError, match="died of SIGSEGV"):
        built_engine(RTX, shadowed / "model.onnx", shadowed / "model.engine")


def test_a_build_that_takes_too_long_is_an_export_error(shadowed: Path) -> None:
    (shadowed / f"{RTX}.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(ExportError, match=r"did not finish within 0\.5 s"):
        built_engine(RTX, shadowed / "model.onnx", shadowed / "model.engine", limit_s=0.5)


@without_gpu
def test_no_engine_runs_without_a_gpu(exported: Exported) -> None:
    assert engine_session(exported.folder / "model.engine") is None


@needs_rtx
def test_the_bindings_have_every_name_that_runs_an_engine() -> None:
    trt = importlib.import_module(RTX)
    classes = {"trt": trt, "_runtime": trt.Runtime, "engine": trt.ICudaEngine, "context": trt.IExecutionContext}
    used = {
        (owner, node.attr)
        for node in ast.walk(ast.parse(Path(tensorrt_session.__file__).read_text()))
        if isinstance(node, ast.Attribute)
        and (owner := getattr(node.value, "attr", None) or getattr(node.value, "id", None)) in classes
    }
    assert {("engine", "get_tensor_shape"), ("context", "execute_async_v3")} <= used
    assert [
        f"{owner}.{name}" for owner, name in used if not hasattr(classes[owner], name) and not name.startswith("__")
    ] == []


def test_other_opsets_are_refused() -> None:
    with pytest.raises(UsageError, match="opset 17"):
        TensorRTOptions(opset=17)
