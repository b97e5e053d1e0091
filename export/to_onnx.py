"""ONNX: one self-contained model.onnx."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import Activations
from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export import onnx_attest, onnx_nms
from castling_deploy.export.onnx_graphs import every_constant, every_node
from castling_deploy.export.onnx_half import half
from castling_deploy.export.onnx_int8 import in_8_bits
from castling_deploy.export.onnx_norms import with_lp_norms
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.onnx_parts import in_parts
from castling_deploy.export.onnx_session import OnnxSession
from castling_deploy.export.onnx_types import checked, inferred
from castling_deploy.export.onnx_unbatched import unbatched
from castling_deploy.facts import stating
from castling_deploy.target import (
    Artifact,
    Attestation,
    Missing,
    Network,
    Precision,
    Session,
    TensorSpec,
    Witness,
    WitnessKind,
)
from castling_deploy.traces import remembered

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx
    import torch
    from torch import nn

    from castling_deploy.target import Arrays

FILE = "model.onnx"
BATCH = "batch"  # the name of a dynamic batch axis
LARGEST_FILE = 2**31 - 1  # bytes in one protobuf message


LEFTOVERS = frozenset({"BatchNormalization", "Dropout", "Identity"})

USAGE = """\
Python, on any CPU:

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["{output}"], {{"{input}": images}})    # images: {shape} float32, normalised
```

Browser (onnxruntime-web):

```javascript
const session = await ort.InferenceSession.create("model.onnx");
const {{ {output} }} = await session.run({{ {input}: new ort.Tensor("float32", pixels, {example}) }});
```

C++:

```cpp
Ort::Session session(env, ORT_TSTR("model.onnx"), Ort::SessionOptions{{}});
auto outputs = session.Run(Ort::RunOptions{{}}, inputNames, &image, 1, outputNames, 1);    // "{input}" -> "{output}"
```
"""

ON_QUALCOMM = """
Qualcomm's NPU (onnxruntime-qnn; onnxruntime-android-qnn): add `QNNExecutionProvider` with its HTP backend
(`backend_path`: libQnnHtp.so or QnnHtp.dll) and `enable_htp_fp16_precision` 1. Weights have 8 bits and activations 16;
norms, residuals and the products of the attention are computed in float16.
"""

SCRIPT = f"""\
def run(folder, inputs):
    import onnx
    import onnxruntime

    # on x86, ONNX Runtime drops float16 between two operators, unless two Identities keep it there
    model = onnx.load(folder / "{FILE}")
    typed = onnx.shape_inference.infer_shapes(model).graph
    graphs, told = (
        [graph, *(item.g for node in graph.node for item in node.attribute if item.HasField("g"))]
        for graph in (model.graph, typed)
    )
    half = onnx.TensorProto.FLOAT16
    values = [v for graph in told for v in (*graph.value_info, *graph.output)]
    halves = {{v.name for v in values if v.type.tensor_type.elem_type == half}}
    for graph in graphs:
        for node in list(graph.node):
            for index, name in enumerate(node.output):
                if name in halves:
                    node.output[index] = name + "/computed"
                    graph.node.append(onnx.helper.make_node("Identity", [name + "/computed"], [name + "/stored"]))
                    graph.node.append(onnx.helper.make_node("Identity", [name + "/stored"], [name]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    del model.graph.value_info[:]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))

"""


class OnnxTarget:
    """One model.onnx, in float32 or typed float16 (`onnx_half`), for ONNX Runtime and every other reader of ONNX."""

    name = "onnx"
    file = FILE
    extra = ""
    runtime = "ort"
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.INT8)
    options: type[Any] = OnnxOptions
    selftests: Mapping[str, str] = {"selftest.py": "run_onnxruntime.py", "selftest.cpp": "selftest.cpp"}

    def missing(self) -> Missing | None:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if find_spec(package) is None:
                return Missing(f"{package} is not installed", "pip install castling-deploy")
        return None

    def unfinished(self) -> Missing | None:
        return None

    def witness(self) -> Witness:
        return Witness(f"onnxruntime {version('onnxruntime')}", WitnessKind.RUNTIME)

    def refuse(self, options: OnnxOptions, batch_size: int) -> None:
        if options.dynamic and options.tokens_at_once is not None:
            raise UsageError("parts of tokens need a fixed batch", hint="leave out --dynamic or --tokens-at-once")
        if options.dynamic and batch_size != 1:
            raise UsageError(
                f"a dynamic batch and a batch of {batch_size} exclude each other", hint="leave out one of the two"
            )

    def lowered(self, network: Network, options: OnnxOptions) -> nn.Module:
        return exported_program(network, dynamic=False).module(check_guards=False)

    def export(self, network: Network, precision: Precision, options: OnnxOptions, folder: Path) -> Artifact:
        made = replace(network, outputs=(*network.outputs, *onnx_nms.outputs(network))) if options.nms else network
        inputs, outputs = specs(made, dynamic=options.dynamic)
        usage = USAGE.format(
            input=inputs[0].name, output=outputs[0].name, shape=inputs[0].shape, example=list(network.inputs[0].shape)
        )
        if options.nms:
            usage += onnx_nms.usage(network)
        if options.form.activations is Activations.UINT16:
            usage += ON_QUALCOMM
        artifact = Artifact((FILE,), inputs, outputs, tools(), ("onnxruntime",), usage)
        told = stating(network, self.name, precision, options, artifact)
        model = onnx_model(told, precision, options.written_opset, dynamic=options.dynamic, nms=options.nms)
        if precision is not Precision.FP16:  # whose small vectors need their own guard
            model = inferred(with_lp_norms(model))
        if options.tokens_at_once is not None:
            model = checked(inferred(in_parts(model, options.tokens_at_once)))
        write(model, folder / FILE)
        details = facts(model)
        if options.tokens_at_once is not None and "Scan" not in details["nodes"]:
            details["notes"].append(f"no part of this network has more than {options.tokens_at_once} tokens at once")
        if options.nms:
            details["notes"].append("the time includes the boxes; PyTorch's ends with the raw outputs")
        return replace(artifact, details=details)

    def attest(self, folder: Path, artifact: Artifact, precision: Precision) -> Attestation:
        return onnx_attest.attest(folder / FILE, artifact, precision)

    @contextmanager
    def load(self, folder: Path, *, threads: int = 1) -> Iterator[Session]:
        yield OnnxSession(folder / FILE, threads, WitnessKind.RUNTIME)

    def dequantised(self, folder: Path) -> list[npt.NDArray[np.floating]]:
        return onnx_attest.dequantised_constants(folder / FILE)

    def constants(self, folder: Path) -> Arrays:
        return constants(folder / FILE)

    def script(self) -> str:
        return SCRIPT


def onnx_model(
    network: Network, precision: Precision, opset: int, *, dynamic: bool = False, nms: bool = False
) -> onnx.ModelProto:
    """`network` as a checked ONNX model, the same bytes for the same network; with `nms`, a detector's boxes too.

    Raises ExportError, and UsageError for `nms` and a network that is no detector.
    """
    program = exported_program(network, dynamic=dynamic)
    model = translated(program, network, opset)
    if not dynamic and all(spec.shape[0] == 1 for spec in network.inputs):
        model = inferred(unbatched(model))
    if precision is Precision.FP16:
        model = half(model, network.islands)
    if network.quantisation is not None:
        model = inferred(in_8_bits(model, network.quantisation))
    softmaxes = sum(str(node.target) in ("aten.softmax.int", "aten._softmax.default") for node in program.graph.nodes)
    check(model, precision, softmaxes=softmaxes, part=network.part)
    if nms:
        model = inferred(onnx_nms.with_boxes(model, network))
    return checked(model)


def exported_program(network: Network, *, dynamic: bool) -> torch.export.ExportedProgram:
    """The graph that torch.export sees. Raises ExportError when it refuses the network."""
    return remembered(("onnx", id(network.module), network.inputs, dynamic), lambda: _traced(network, dynamic=dynamic))


def _traced(network: Network, *, dynamic: bool) -> torch.export.ExportedProgram:
    import torch

    if dynamic:  # torch.export takes an axis of 1 for a constant: trace two images
        network = replace(network, inputs=tuple(replace(spec, shape=(2, *spec.shape[1:])) for spec in network.inputs))
    shapes = tuple({0: torch.export.Dim(BATCH)} for _ in network.inputs) if dynamic else None
    try:
        with torch.no_grad():
            return torch.export.export(network.module, network.example(), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises errors of a dozen classes, most of them private
        raise ExportError(
            f"torch.export refuses the network: {error}", hint="leave out --dynamic" if dynamic else None
        ) from error


def translated(program: torch.export.ExportedProgram, network: Network, opset: int) -> onnx.ModelProto:
    """The program as an ONNX model with shapes on every tensor, and without torch's traces of this machine."""
    import onnx
    import torch

    try:
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            external_data=False,
            verbose=False,
            input_names=[spec.name for spec in network.inputs],
            output_names=[spec.name for spec in network.outputs],
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch.onnx refuses the network: {error}", hint="try another --opset") from error
    assert exported is not None
    model = exported.model_proto
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written != {"": opset}:  # torch logs a warning and leaves the file as it was
        raise ExportError(f"torch wrote opset {written} where {opset} was asked for", hint="use --opset 20")
    for index, node in enumerate(model.graph.node):
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        module = ast.literal_eval(scopes[0])[-2] if scopes else ""
        node.name = f"{module}/{node.op_type}_{index}"  # blocks.0.attn.query/MatMul_7
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_param = BATCH
    for item in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        item.ClearField("metadata_props")  # names of classes, lines of source, paths
        item.ClearField("doc_string")
    model.graph.ClearField("value_info")
    model.graph.name, model.doc_string = network.name, network.description
    onnx.helper.set_model_props(model, dict(network.metadata))
    return inferred(model)


def check(model: onnx.ModelProto, precision: Precision, *, softmaxes: int, part: bool = False) -> None:
    """Raises ExportError unless the graph is what was asked for; `softmaxes` is what the network itself has.

    A `part` of a network may have no product in its precision.
    """
    graph = model.graph
    operators = Counter(node.op_type for node in graph.node)
    left = [f"{operators[name]} {name}" for name in sorted(LEFTOVERS & operators.keys())]
    if operators["Softmax"] > softmaxes:
        left.append(f"{operators['Softmax']} Softmax where the network has {softmaxes}")
    if model.functions:
        left.append(f"{len(model.functions)} functions")
    used = {name for node in graph.node for name in node.input}
    left += [f"the unused constant {tensor.name}" for tensor in graph.initializer if tensor.name not in used]
    if left:
        raise ExportError(f"the graph is not clean: {', '.join(left)}", hint="report this network")
    if precision.value not in product_types(model) and not part:
        raise ExportError(
            f"{precision} was asked for, and no product of the graph is computed in it", hint="report this network"
        )


def product_types(model: onnx.ModelProto) -> Counter[str]:
    """How many convolutions and matrix products are computed in fp32, in fp16 and in int8."""
    names = {"float32": Precision.FP32.value, "float16": Precision.FP16.value}
    types, in_8_bits = onnx_attest.dtypes(model), onnx_attest.dequantised(model.graph)
    return Counter(
        Precision.INT8.value if in_8_bits.issuperset(node.input[1:2]) else names[types[node.output[0]]]
        for node in every_node(model.graph)
        if node.op_type in onnx_attest.PRODUCTS
    )


def write(model: onnx.ModelProto, path: Path) -> None:
    """One file with everything in it. Raises ExportError over 2 GB."""
    if model.ByteSize() > LARGEST_FILE:
        raise ExportError(
            f"the network takes {model.ByteSize()} bytes, and one ONNX file holds {LARGEST_FILE}",
            hint="use --precision fp16",
        )
    path.write_bytes(model.SerializeToString(deterministic=True))


def constants(path: Path) -> dict[str, Any]:
    """The initialisers of the file `path` by name, as arrays. Raises ExportError where it cannot be read."""
    import onnx

    graph = onnx_attest.loaded(path).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in every_constant(graph)}


def specs(network: Network, *, dynamic: bool) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the file; a dynamic batch is -1."""
    if not dynamic:
        return network.inputs, network.outputs
    inputs, outputs = (
        tuple(replace(spec, shape=(-1, *spec.shape[1:])) for spec in group)
        for group in (network.inputs, network.outputs)
    )
    return inputs, outputs


def tools() -> dict[str, str]:
    """Versions of what wrote the graph."""
    return {package: version(package) for package in ("torch", "onnx", "onnxscript")}


def facts(model: onnx.ModelProto) -> dict[str, Any]:
    """What the report says about a graph."""
    products = product_types(model)
    notes = ["on x86, ONNX Runtime stores float16 and computes in float32"] if products[Precision.FP16] else []
    if products[Precision.INT8]:
        notes.append("8-bit products are exact with VNNI (x86) and dot products (Arm); x86 before VNNI adds in 16 bits")
    return {
        **onnx_attest.contents(model),
        "products": dict(products),
        "notes": notes,
    }
