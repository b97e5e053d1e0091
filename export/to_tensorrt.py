"""TensorRT: a strongly typed model.onnx and, where TensorRT or TensorRT-RTX is installed, its model.engine."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import ExportError
from castling_deploy.export import onnx_attest, tensorrt_build, to_onnx
from castling_deploy.export.onnx_options import require_opset
from castling_deploy.export.onnx_session import OnnxSession
from castling_deploy.export.tensorrt_session import EngineSession
from castling_deploy.facts import stating
from castling_deploy.target import Artifact, Attestation, Missing, Network, Precision, Session, Witness, WitnessKind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from castling_deploy.target import Arrays

ENGINE = "model.engine"
RTX = "tensorrt_rtx"
MODULES = ("tensorrt", RTX)  # in order of preference; the first builds on a GPU only
BUILD_LIMIT_S = 3600  # TensorRT-RTX takes 1 s for DeiT-T; TensorRT times its kernels first
IMPORT_LIMIT_S = 60
REMARK = " (typed graph)"
BUILD = (
    f"in the artefact's folder, on the machine with the GPU: trtexec --onnx={to_onnx.FILE} --saveEngine={ENGINE} "
    f"--stronglyTyped (TensorRT 10, 11) or tensorrt_rtx --onnx={to_onnx.FILE} --saveEngine={ENGINE}"
)
FIX = f"pip install 'castling-deploy[tensorrt-rtx]' and export again; or, {BUILD}"
GRAPH_ALONE = "use --target onnx with the same precision: it writes the graph that the engine is built from"

USAGE = f"""\
`{ENGINE}` is the plan as the builder wrote it, nothing in front of it; it runs with the version of TensorRT that built
it. TensorRT-RTX builds for Ampere, Ada and Blackwell GPUs without seeing one; TensorRT builds for the GPU it sees.
`{to_onnx.FILE}` is the strongly typed graph: rebuild the engine from it for another version or GPU,

```sh
trtexec --onnx={to_onnx.FILE} --saveEngine={ENGINE} --stronglyTyped    # TensorRT 10, 11
tensorrt_rtx --onnx={to_onnx.FILE} --saveEngine={ENGINE}               # TensorRT-RTX
```

Python (`import tensorrt_rtx as trt` for TensorRT-RTX):

```python
import tensorrt as trt
import torch

engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(open("{ENGINE}", "rb").read())
context = engine.create_execution_context()
image = torch.empty({{shape}}, device="cuda")     # float32, normalised
logits = torch.empty({{logits}}, device="cuda")
context.set_tensor_address("{{input}}", image.data_ptr())
context.set_tensor_address("{{output}}", logits.data_ptr())
context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
```

C++:

```cpp
auto engine = runtime->deserializeCudaEngine(plan.data(), plan.size());
auto context = engine->createExecutionContext();
context->setTensorAddress("{{input}}", image);
context->setTensorAddress("{{output}}", logits);
context->enqueueV3(stream);
```
"""


@dataclass(frozen=True)
class TensorRTOptions:
    """`opset` of the graph that the engine is built from. Raises UsageError for a bad opset."""

    opset: int = 20

    def __post_init__(self) -> None:
        require_opset(self.opset)

    @property
    def form(self) -> Quantisation:
        return Quantisation({}, Activations.INT8)  # its parser takes no zero point but 0


class TensorRTTarget:
    """A typed ONNX graph and its engine. Precision is in the graph: TensorRT 11 knows no other way to ask for it."""

    name = "tensorrt"
    file = to_onnx.FILE
    extra = "tensorrt-rtx"
    runtime = "tensorrt"
    precisions: tuple[Precision, ...] = (Precision.FP16, Precision.FP32, Precision.INT8)
    effort = 10.0
    options: type[Any] = TensorRTOptions
    selftests: Mapping[str, str] = {"selftest.py": "run_onnxruntime.py"}

    def missing(self) -> Missing | None:
        return to_onnx.OnnxTarget().missing()  # the graph needs no TensorRT

    def unfinished(self) -> Missing | None:
        found = builder()
        return found if isinstance(found, Missing) else None

    def witness(self) -> Witness:
        for module in gpu_modules():
            return Witness(f"{module} {version(module)}", WitnessKind.DEVICE)
        return Witness(f"onnxruntime {version('onnxruntime')}{REMARK}", WitnessKind.REFERENCE)

    def refuse(self, options: TensorRTOptions, batch_size: int) -> None:
        pass  # every batch can be fixed

    def lowered(self, network: Network, options: TensorRTOptions) -> nn.Module:
        return to_onnx.exported_program(network, dynamic=False).module(check_guards=False)

    def export(self, network: Network, precision: Precision, options: TensorRTOptions, folder: Path) -> Artifact:
        artifact = Artifact(
            (to_onnx.FILE,),
            network.inputs,
            network.outputs,
            to_onnx.tools(),
            ("onnxruntime",),
            USAGE.format(
                input=network.inputs[0].name,
                output=network.outputs[0].name,
                shape=network.inputs[0].shape,
                logits=network.outputs[0].shape,
            ),
        )
        model = to_onnx.onnx_model(stating(network, self.name, precision, options, artifact), precision, options.opset)
        to_onnx.write(model, folder / to_onnx.FILE)
        artifact = replace(artifact, details=to_onnx.facts(model))
        module = builder()
        if isinstance(module, Missing):
            return replace(artifact, unfinished=module)
        built = built_engine(module, folder / to_onnx.FILE, folder / ENGINE)
        require_products(built, artifact.details["products"])
        notes = list(artifact.details["notes"])
        if not gpu_modules():
            notes.append(f"the engine was built by {module} {built['builder_version']}; no GPU here has run it")
        return replace(
            artifact,
            files=(to_onnx.FILE, ENGINE),
            loads_with=(module, "onnxruntime"),
            tools={**artifact.tools, module: built["builder_version"]},
            details={**artifact.details, **built, "notes": notes},
        )

    def attest(self, folder: Path, artifact: Artifact, precision: Precision) -> Attestation:
        """The graph's types; and the engine's, where its builder is here: TensorRT-RTX writes the same bytes again."""
        return onnx_attest.attest(folder / to_onnx.FILE, artifact, precision, engine_problems(folder, artifact))

    @contextmanager
    def load(self, folder: Path, *, threads: int = 1) -> Iterator[Session]:
        yield engine_session(folder / ENGINE) or OnnxSession(
            folder / to_onnx.FILE, threads, WitnessKind.REFERENCE, remark=REMARK
        )

    def dequantised(self, folder: Path) -> list[npt.NDArray[np.floating]]:
        return onnx_attest.dequantised_constants(folder / to_onnx.FILE)

    def constants(self, folder: Path) -> Arrays:
        return to_onnx.constants(folder / to_onnx.FILE)

    def script(self) -> str:
        return to_onnx.SCRIPT


def engine_problems(folder: Path, artifact: Artifact) -> tuple[str, ...]:
    """What is wrong about the engine beside its graph; nothing where this machine cannot tell.

    An engine does not say what its products are computed in, and is not loaded without a GPU. But TensorRT-RTX 1.7.1
    builds the same bytes of the same graph (TensorRT does not: it times its kernels).
    """
    engine = folder / ENGINE
    if ENGINE not in artifact.files:
        return ()
    if not engine.is_file():
        return (f"{ENGINE} is not there",)
    wrote = artifact.tools.get(RTX)
    if wrote is None or not installed(RTX) or wrote != version(RTX):
        return ()
    with tempfile.TemporaryDirectory() as again:
        try:
            built_engine(RTX, folder / to_onnx.FILE, Path(again, ENGINE))
        except ExportError as error:
            return (f"{to_onnx.FILE} does not build: {error.message}",)
        if Path(again, ENGINE).read_bytes() != engine.read_bytes():
            return (f"{ENGINE} is not what {RTX} {wrote} builds from {to_onnx.FILE}",)
    return ()


def installed(module: str) -> bool:
    """Whether there is such a module, working or not; an import hook that forbids it counts as no."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def builder() -> str | Missing:
    """The module that builds engines on this machine, or why there is none."""
    reasons = []
    for module in MODULES:
        reason = obstacle(module)
        if reason is None:
            return module
        reasons.append(reason)
    return Missing("; ".join(reasons), FIX)


def obstacle(module: str) -> str | None:
    """Why `module` cannot build here; None when it can. It is imported in a process of its own."""
    if not installed(module):
        return f"{module} is not installed"
    try:
        reason: str | None = in_child([module], limit_s=IMPORT_LIMIT_S)["obstacle"]
    except ExportError as error:
        return error.message
    return reason


def built_engine(module: str, model: Path, engine: Path, limit_s: float = BUILD_LIMIT_S) -> dict[str, Any]:
    """Facts about the engine that `module` built from `model`, for the report.

    Raises ExportError when it refuses the model, crashes, or takes longer than `limit_s` seconds.
    """
    answer = in_child([module, str(model), str(engine)], limit_s)
    if "unwritten" in answer:
        raise OSError(*answer["unwritten"])
    if "refused" in answer:
        raise ExportError(f"{module} refuses {model.name}: {'; '.join(answer['refused'])}", hint=GRAPH_ALONE)
    return {**answer["built"], "engine_bytes": engine.stat().st_size}


def require_products(built: Mapping[str, Any], products: Mapping[str, int]) -> None:
    """Raises ExportError unless the engine computes its products in the types that the graph does."""
    if not built["engine_products"].keys() <= products.keys():
        raise ExportError(
            f"the graph's products are {dict(products)}, and the engine's are {built['engine_products']}",
            hint=f"report this, with {built['builder']} {built['builder_version']}",
        )


def in_child(arguments: list[str], limit_s: float) -> dict[str, Any]:
    """The answer of `tensorrt_build`. Raises ExportError when the process crashes or takes too long."""
    module = arguments[0]
    command = [sys.executable, "-P", tensorrt_build.__file__, *arguments]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{module} did not finish within {limit_s:g} s", hint=GRAPH_ALONE) from error
    if child.returncode == 0:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return answer
    died = (
        f"died of {signal.Signals(-child.returncode).name}"
        if child.returncode < 0
        else f"ended with exit code {child.returncode}"
    )
    last = (child.stderr.splitlines() or ["no message"])[-1]
    raise ExportError(f"the process of {module} {died}: {last}", hint=GRAPH_ALONE)


def gpu_modules() -> list[str]:
    """The modules that can run an engine here: on a GPU, with a CUDA build of torch to hold inputs and outputs."""
    torch = find_spec("torch")
    roots = torch.submodule_search_locations if torch is not None else None
    cuda = any(any(Path(root, "lib").glob("*torch_cuda*")) for root in roots or ())
    return [module for module in MODULES if installed(module)] if cuda and tensorrt_build.gpu_present() else []


def engine_session(engine: Path) -> EngineSession | None:
    """`engine` on this machine's GPU; None where there is no GPU, no engine, or no module that runs engines.

    Raises ExportError when there are all three and they do not fit together.
    """
    modules = gpu_modules()
    if not (modules and engine.is_file()):
        return None
    refusals = []
    for module in modules:
        try:
            return EngineSession(importlib.import_module(module), engine)
        except (ExportError, ImportError, OSError) as error:
            refusals.append(str(error))
    raise ExportError("; ".join(refusals), hint=f"build the engine again, {BUILD}")
