"""ExecuTorch: one model.pte for XNNPACK, the CPUs of phones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import Activations, Quantisation, require_weight_bits
from castling_deploy.errors import ExportError, ShapeError, UsageError
from castling_deploy.export.attesting import attestation
from castling_deploy.export.executorch_session import METADATA, ExecuTorchSession
from castling_deploy.export.half_network import in_half
from castling_deploy.export.pte_contents import PteContents, pte_contents
from castling_deploy.export.rms_norms import in_rms_norms
from castling_deploy.export.scopes import inside
from castling_deploy.export.torch_int8 import in_8_bits
from castling_deploy.export.xnnpack_forms import in_xnnpack_forms
from castling_deploy.export.xnnpack_patterns import needed_patterns
from castling_deploy.export.xnnpack_payload import Payload, read_payload
from castling_deploy.facts import stating
from castling_deploy.target import Artifact, Attestation, Missing, Network, Precision, Session, Witness, WitnessKind
from castling_deploy.traces import remembered

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

FILE = "model.pte"
LINE = "1.5."  # the forms, the runtime's thread pool and the reader of the file were checked with 1.5.1
FIX = "pip install 'castling-deploy[executorch]'"
BACKEND = "XnnpackBackend"
CAST = "dim_order_ops::_to_dim_order_copy"

USAGE = """\
Input `{input}`: {shape} float32, normalised. Output `{output}`: {logits} float32. The method `metadata` of the file
takes no input and returns preprocessing and labels, a JSON string.

Android (Kotlin), with `implementation("org.pytorch:executorch-android:1.5.+")`:

```kotlin
val module = Module.load(path)                                            // org.pytorch.executorch
val image = Tensor.fromBlob(pixels, longArrayOf({sizes}))
val logits = module.forward(EValue.from(image))[0].toTensor().dataAsFloatArray
```

iOS and macOS (Swift), linked with `executorch`, `backend_xnnpack` and `kernels_optimized`:

```swift
import ExecuTorch

let module = Module(filePath: path)
let image = Tensor<Float>(pixels, shape: [{sizes}])
let logits = try Tensor<Float>(module.forward(image)).scalars()
```

Python:

```python
from executorch.runtime import Runtime

forward = Runtime.get().load_program("{file}").load_method("forward")
(logits,) = forward.execute([image])    # a contiguous torch.Tensor: the runtime ignores strides
```
"""

SCRIPT = f"""\
def run(folder, inputs):
    import json

    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(folder / "{FILE}")
    names = json.loads(program.load_method("{METADATA}").execute([])[0])
    tensors = [torch.from_numpy(inputs[name]) for name in names["inputs"]]
    outputs = program.load_method("forward").execute(tensors)
    return {{name: tensor.numpy().copy() for name, tensor in zip(names["outputs"], outputs)}}

"""


@dataclass(frozen=True)
class ExecuTorchOptions:
    """`min_delegated` percent of the operations have to run inside XNNPACK, or the export fails. `weight_bits` of int8
    are 8, or 4 for Linears whose inputs come in groups.

    Raises UsageError for what is no percentage, and for other bits.
    """

    min_delegated: float = 0.0
    weight_bits: int = Quantisation.weight_bits

    def __post_init__(self) -> None:
        if not 0 <= self.min_delegated <= 100:
            raise UsageError(f"{self.min_delegated:g} % of the operations", hint="--min-delegated takes 0 to 100")
        require_weight_bits(self.weight_bits)

    @property
    def form(self) -> Quantisation:
        """XNNPACK's Linear with float outputs: nothing is quantised between two of them."""
        return Quantisation({}, Activations.PER_TOKEN, weight_bits=self.weight_bits)


class ExecuTorchTarget:
    """One model.pte, delegated to XNNPACK, in float32 or with float16 weights and arithmetic.

    In float16 the interface stays float32. ExecuTorch keeps the kernels of convolutions in float32 inside the file,
    and GELU runs outside XNNPACK, which has no float16 kernel for it. In int8 the Linears are (`torch_int8`).
    """

    name = "executorch"
    file = FILE
    extra = "executorch"
    runtime = "executorch"
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.INT8)
    effort = 33.0
    options: type[Any] = ExecuTorchOptions
    selftests: Mapping[str, str] = {"selftest.py": "run_executorch.py", "Selftest.kt": "Selftest.kt"}

    def missing(self) -> Missing | None:
        installed = installed_version()
        if installed is None:
            return Missing("executorch is not installed", FIX)
        if not installed.startswith(LINE):
            return Missing(f"executorch {installed} is installed, and {LINE}x is needed", FIX)
        return None

    def unfinished(self) -> Missing | None:
        return None

    def witness(self) -> Witness:
        return Witness(f"executorch {installed_version() or LINE + 'x'} XNNPACK", WitnessKind.RUNTIME)

    def refuse(self, options: ExecuTorchOptions, batch_size: int) -> None:
        pass  # every batch can be fixed

    def lowered(self, network: Network, options: ExecuTorchOptions) -> nn.Module:
        return program_of(replace(network, quantisation=None), Precision.FP32).module(check_guards=False)

    def export(self, network: Network, precision: Precision, options: ExecuTorchOptions, folder: Path) -> Artifact:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.utils.configs import get_transform_passes, get_xnnpack_edge_compile_config
        from executorch.exir import to_edge_transform_and_lower

        (image,), logits = network.inputs, network.outputs[0]
        usage = USAGE.format(
            input=image.name,
            shape=image.shape,
            output=logits.name,
            logits=logits.shape,
            file=FILE,
            sizes=", ".join(map(str, image.shape)),
        )
        tools = {package: version(package) for package in ("torch", "executorch")}
        artifact = Artifact((FILE,), network.inputs, network.outputs, tools, ("executorch",), usage)
        told = metadata(stating(network, self.name, precision, options, artifact))
        program = program_of(network, precision)
        with needed_patterns(program):
            edge = to_edge_transform_and_lower(
                program,
                transform_passes=get_transform_passes(),
                partitioner=[XnnpackPartitioner()],
                constant_methods={METADATA: told},
                compile_config=get_xnnpack_edge_compile_config(),
            )
        data = edge.to_executorch().buffer
        contents = pte_contents(data)
        check(contents, network, precision)
        details = facts(contents, edge.exported_program().graph_module, precision)
        require_delegated(details, options.min_delegated)
        (folder / FILE).write_bytes(data)
        return replace(artifact, details=details)

    def attest(self, folder: Path, artifact: Artifact, precision: Precision) -> Attestation:
        contents = read_contents(folder / FILE)
        payloads = payloads_of(contents)
        told = json.loads(contents.texts.get(METADATA, "{}"))
        others = sorted({name for name, _ in contents.payloads} - {BACKEND})
        return attestation(
            artifact,
            precision,
            sum((payload.products for payload in payloads), Counter()),
            sum((payload.operations for payload in payloads), Counter(contents.outside_dtypes)),
            sum((payload.constant_bytes for payload in payloads), Counter()),
            [f"a delegate for {name} is in the file, which is not read here" for name in others],
            {key: value for key, value in told.items() if isinstance(value, str)},
            inputs=dict(zip(told.get("inputs", ()), contents.inputs)),
            outputs=dict(zip(told.get("outputs", ()), contents.outputs)),
            details=contained(contents, precision),
        )

    def dequantised(self, folder: Path) -> list[npt.NDArray[np.floating]]:
        contents = read_contents(folder / FILE)
        levels = (levels for payload in payloads_of(contents) for levels in payload.levels)
        try:
            return [each.dequantised(contents.named) for each in levels]
        except (KeyError, ValueError) as error:
            raise ExportError(f"the weights of {FILE} cannot be read: {error}") from error

    @contextmanager
    def load(self, folder: Path, *, threads: int = 1) -> Iterator[Session]:
        session = ExecuTorchSession(folder / FILE, threads, self.witness())
        try:
            yield session
        finally:
            session.close()

    def script(self) -> str:
        return SCRIPT


def installed_version() -> str | None:
    try:
        return version("executorch")
    except PackageNotFoundError:
        return None


def read_contents(path: Path) -> PteContents:
    """The contents of the file `path`. Raises ExportError."""
    try:
        return pte_contents(path.read_bytes())
    except Exception as error:  # OSError, and what ExecuTorch's reader says of a damaged file: ValueError, struct's
        raise ExportError(f"{path.name} cannot be read: {error}", hint="export the network again") from error


def payloads_of(contents: PteContents) -> list[Payload]:
    """What XNNPACK is handed. Raises ExportError."""
    return [read_payload(data) for name, data in contents.payloads if name == BACKEND]


def program_of(network: Network, precision: Precision) -> torch.export.ExportedProgram:
    """The graph that the lowering is handed. Raises ShapeError, ExportError."""
    key = "executorch", id(network.module), precision, network.islands, id(network.quantisation)
    return remembered(key, lambda: in_xnnpack_forms(traced(network, precision)))


def traced(network: Network, precision: Precision) -> torch.export.ExportedProgram:
    """The graph that torch.export sees. Raises ShapeError for an open axis, ExportError when torch refuses."""
    import torch

    for spec in (*network.inputs, *network.outputs):
        if min(spec.shape) < 1:
            raise ShapeError(
                f"'{spec.name}' has the shape {spec.shape}, and a .pte file for XNNPACK has fixed shapes",
                hint="give every axis a size: --batch-size, --imgsz",
            )
    module = in_rms_norms(network.module)
    if precision is Precision.FP16:
        module = in_half(module, network.islands)
    if network.quantisation is not None:
        module = in_8_bits(module, network.quantisation)
    try:
        with torch.no_grad():
            return torch.export.export(module, network.example())
    except Exception as error:  # torch.export raises errors of a dozen classes, most of them private
        raise ExportError(f"torch.export refuses the network: {error}") from error


def metadata(network: Network) -> str:
    """What travels inside the file, as JSON: names of inputs and outputs, and the network's own facts."""
    return json.dumps(
        {
            **network.metadata,
            "inputs": [spec.name for spec in network.inputs],
            "outputs": [spec.name for spec in network.outputs],
        }
    )


def facts(contents: PteContents, edge: torch.fx.GraphModule, precision: Precision) -> dict[str, Any]:
    """What the report says about the file; `edge` is the program it was written from."""
    from executorch.exir.lowered_backend_module import get_lowered_backend_modules

    inside = sum(
        node.op == "call_function"
        for lowered in get_lowered_backend_modules(edge)
        for node in lowered.original_module.graph.nodes
    )
    return {
        **contained(contents, precision),
        "delegated_ops": inside,
        "delegated": inside / (inside + sum(contents.outside.values())),
    }


def require_delegated(details: Mapping[str, Any], percent: float) -> None:
    """Raises ExportError where XNNPACK takes less than `percent` of the operations; names those that it does not."""
    if 100 * details["delegated"] < percent:
        outside = ", ".join(f"{count} {name.partition('::')[2]}" for name, count in details["outside"].items())
        raise ExportError(
            f"XNNPACK takes {100 * details['delegated']:.1f} % of the operations, and {percent:g} % were asked for; "
            f"outside are {outside}",
            hint="use --precision fp32, whose operations XNNPACK takes, or a lower --min-delegated",
        )


def contained(contents: PteContents, precision: Precision) -> dict[str, Any]:
    """What the report says that stands in the file itself."""
    return {
        "delegates": contents.delegates,
        "outside": dict(sorted(contents.outside.items())),
        "notes": notes(contents, precision),
    }


def notes(contents: PteContents, precision: Precision) -> list[str]:
    found = [
        f"XNNPACK does not take {count} {name.partition('::')[2]}: run by ExecuTorch's own kernels"
        for name, count in sorted(contents.outside.items())
        if name != CAST
    ]
    if precision is Precision.FP16:
        found += [
            "needs a CPU with float16 arithmetic: Armv8.2-A, or x86 with AVX2, where a float32 file is faster",
            "XNNPACK adds in float32 on x86 (1.5.1); its Arm kernels may add in float16",
        ]
    return found


def check(contents: PteContents, network: Network, precision: Precision) -> None:
    """Raises ExportError unless XNNPACK runs the network, with every float weight of a Linear stored as asked for."""
    from torch import nn

    if not contents.delegates and not network.part:
        raise ExportError("XNNPACK takes no operation of this network", hint="report this network")
    levels = network.quantisation
    for name, module in network.module.named_modules():
        if not isinstance(module, nn.Linear) or (levels and name in levels.ranges):
            continue
        weight = module.weight.detach()
        if precision is Precision.FP16 and not inside(name, network.islands):
            weight = weight.half()
        if stored(weight) not in contents.constants:
            raise ExportError(
                f"{precision} was asked for, and the file does not hold {name}.weight in it", hint="report this network"
            )


def stored(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
