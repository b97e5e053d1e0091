"""Core AI: one model.aimodel, for iOS 27, macOS 27 and later."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import ExportError
from castling_deploy.export.attesting import PRECISIONS, attestation, require_8_bits
from castling_deploy.export.channels_first import Layout, require_layout
from castling_deploy.export.coreai_asset import (
    OURS,
    PRODUCTS,
    AssetContents,
    counts,
    dequantised,
    look_up_tables,
    product_types,
    read_asset,
    write_asset,
)
from castling_deploy.export.coreai_program import FUNCTION, Wide, converted, exported_program, wide_in
from castling_deploy.export.coreai_session import CoreAISession
from castling_deploy.export.coreai_steps import NUMPY
from castling_deploy.export.neural_engine import note, unfit
from castling_deploy.facts import stating
from castling_deploy.palette import require_bits
from castling_deploy.target import (
    Artifact,
    Attestation,
    Missing,
    Network,
    Precision,
    Session,
    Witness,
    WitnessKind,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from castling_deploy.target import Arrays

FILE = "model.aimodel"
# A beta: the converter, the reading back and the runtime were checked with these, and the formats still move.
PACKAGES = {"coreai-core": "1.0.0b3", "coreai-torch": "0.4.3"}
FIX = "pip install 'castling-deploy[coreai]'"
DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.INT8: "float16"}  # computed in
KNOWN = frozenset({*DTYPES.values(), "int8"})
SLOW_IMAGES = 12  # with the structured probes about 25 inputs, 7 to 20 s
STATISTICS = frozenset({"layer_norm"})  # coreai-torch computes their mean and variance in float32

USAGE = """\
Swift, on iOS 27 or macOS 27 and later:

```swift
import CoreAI

let model = try await AIModel(contentsOf: modelURL)
let function = try model.loadFunction(named: "{function}")!
let image = NDArray(scalars: pixels, shape: {shape})    // [Float], normalised
var outputs = try await function.run(inputs: ["{input}": image])
let logits = outputs.remove("{output}")!.ndArray!    // {logits} float32
```

Python, on Linux x86-64 or a Mac, in a coroutine:

```python
from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray

async with AIModelAsset.load("{file}").executable() as model:
    function = model.load_function("{function}")
    outputs = await function({{"{input}": NDArray(image)}})    # {shape} float32, normalised
    logits = outputs["{output}"].numpy()
```
"""

SCRIPT = f"""\
def run(folder, inputs):
    import asyncio

    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async def outputs():
        async with AIModelAsset.load(folder / "{FILE}").executable() as model:
            found = await model.load_function("{FUNCTION}")({{name: NDArray(value) for name, value in inputs.items()}})
            return {{name: np.array(value.numpy()) for name, value in found.items()}}

    return asyncio.run(outputs())

"""


@dataclass(frozen=True)
class CoreAIOptions:
    """Shapes are fixed, and the device decides where it runs.

    `palettise` is for int8: weights in a look-up table for each, by an index of so many bits, instead of in levels.
    `layout` is that of the tokens inside: "channels-last" (B, N, C), "channels-first" (B, C, 1, N). Raises UsageError
    for anything else.
    """

    palettise: int | None = None
    layout: Layout = "channels-last"

    def __post_init__(self) -> None:
        require_layout(self.layout)
        require_bits(self.palettise)

    @property
    def form(self) -> Quantisation:
        return Quantisation({}, Activations.FLOAT16, palette=self.palettise)


class CoreAITarget:
    """One model.aimodel with fixed shapes, in float32 or with float16 weights and arithmetic.

    In float16 the interface stays float32, and a LayerNorm, one operation to a device, is written out with float32
    statistics: that is how the interpreter on Linux computes it. INT8 is FP16 with int8 weights.
    """

    name = "coreai"
    file = FILE
    extra = "coreai"
    runtime = "coreai"
    selftests: Mapping[str, str] = {"selftest.py": "run_coreai.py"}
    precisions: tuple[Precision, ...] = (Precision.FP16, Precision.FP32, Precision.INT8)
    effort = 17.0
    options: type[Any] = CoreAIOptions

    @property
    def images(self) -> Mapping[Precision, int]:
        """The interpreter on Linux computes float16 number by number: 0.3 to 0.7 s for an image of 128 pixels."""
        return {} if sys.platform == "darwin" else dict.fromkeys((Precision.FP16, Precision.INT8), SLOW_IMAGES)

    def missing(self) -> Missing | None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64") and sys.platform != "darwin":
            return Missing(
                f"Core AI's packages have no wheels for {platform.system()} on {platform.machine()}",
                f"{FIX}, on macOS or on Linux x86-64, which have wheels",
            )
        for package, needed in PACKAGES.items():
            installed = installed_version(package)
            if installed is None:
                return Missing(f"{package} is not installed", FIX)
            if installed != needed:
                return Missing(f"{package} {installed} is installed, and {needed} is needed", FIX)
        return None

    def unfinished(self) -> Missing | None:
        return None

    def witness(self) -> Witness:
        core = installed_version("coreai-core") or PACKAGES["coreai-core"]
        place = (
            f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"CPU interpreter, {platform.system()}"
        )
        interpreted = sys.platform != "darwin"
        return Witness(f"coreai-core {core} ({place})", WitnessKind.RUNTIME, interpreted)

    def refuse(self, options: CoreAIOptions, batch_size: int) -> None:
        pass  # every batch can be fixed

    def lowered(self, network: Network, options: CoreAIOptions) -> nn.Module:
        program = exported_program(replace(network, quantisation=None), Precision.FP32, options.layout)
        return program.module(check_guards=False)

    def export(self, network: Network, precision: Precision, options: CoreAIOptions, folder: Path) -> Artifact:
        (image,), logits = network.inputs, network.outputs[0]
        usage = USAGE.format(
            function=FUNCTION,
            input=image.name,
            shape=list(image.shape),
            output=logits.name,
            logits=list(logits.shape),
            file=FILE,
        )
        artifact = Artifact(
            (FILE,),
            network.inputs,
            network.outputs,
            {package: version(package) for package in ("torch", *PACKAGES)},
            ("Core AI on iOS 27 or macOS 27", "coreai-core on Linux x86-64"),
            usage,
        )
        inputs, outputs = (tuple(spec.name for spec in specs) for specs in (network.inputs, network.outputs))
        program = exported_program(network, precision, options.layout)
        wide = wide_in(program, network.islands)
        asset = converted(program, inputs, outputs)
        told = stating(network, self.name, precision, options, artifact).metadata
        write_asset(asset, folder / FILE, network.description, told)
        contents = read_asset(folder / FILE)
        check(contents, network, precision, wide)
        return replace(artifact, details=facts(contents, precision))

    def attest(self, folder: Path, artifact: Artifact, precision: Precision) -> Attestation:
        contents = read_asset(folder / FILE)
        products = product_types(contents)
        weights: Counter[str] = Counter()
        for value in contents.constants.values():
            weights[value.dtype.name] += value.nbytes
        return attestation(
            artifact,
            precision,
            products,
            Counter(name for operation in contents.operations for name in operation.results),
            weights,
            [f"{count} products are in {name}" for name, count in products.items() if name not in KNOWN],
            contents.metadata.get("creatorDefinedMetadata", {}).get(OURS, {}),
            inputs={name: declared(kind) for name, kind in contents.inputs},
            outputs={name: declared(kind) for name, kind in contents.outputs},
            details=facts(contents, precision),
        )

    @contextmanager
    def load(self, folder: Path, *, threads: int = 1) -> Iterator[Session]:
        """The interpreter on Linux is one thread whatever is asked for; on macOS Core AI chooses alone."""
        session = CoreAISession(folder / FILE, self.witness())
        try:
            yield session
        finally:
            session.close()

    def dequantised(self, folder: Path) -> list[npt.NDArray[np.floating]]:
        return dequantised(folder / FILE)

    def constants(self, folder: Path) -> Arrays:
        return read_asset(folder / FILE).constants

    def script(self) -> str:
        return SCRIPT


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check(contents: AssetContents, network: Network, precision: Precision, wide: Wide) -> None:
    """Raises ExportError unless the asset has the network's interface, and all its arithmetic the precision asked for.

    As many products as the network has Linears in 8 bits have such weights. The border may cast, and a norm may keep
    its statistics in float32. Where a float16 network has islands, as many products as `wide` has are float32, and no
    value changes its type but at its casts: what coreai-torch had widened by itself would have casts of its own. A
    part of a network may have no product.
    """
    asked = {DTYPES[precision]}
    products = [operation for operation in contents.operations if operation.name.endswith(PRODUCTS)]
    wrong = [operation for operation in products if operation.floats != asked]
    if precision is not Precision.FP32 and (network.islands or network.reductions):
        inner = [operation for operation in wrong if operation.floats == {DTYPES[Precision.FP32]}]
        casts = sum(one.name == "cast" and one.graph == FUNCTION for one in contents.operations)
        if len(inner) != wide.products or casts > wide.casts:
            raise ExportError(
                f"{precision} was asked for, with {wide.products} products and {wide.casts} casts for what stays in "
                f"float32, and {len(inner)} products and {casts} casts were built",
                hint="report this network",
            )
        wrong = [operation for operation in wrong if len(operation.floats) > 1]
    else:
        wrong += [
            operation
            for operation in contents.operations
            if operation.results - asked and operation.name != "cast" and operation.graph not in STATISTICS
        ]
    if wrong or not (products or network.part):
        found = ", ".join(f"{one.name} in {' and '.join(sorted(one.floats))}" for one in wrong[:3])
        raise ExportError(
            f"{precision} was asked for, and not built: {found or 'there is no product'}", hint="report this network"
        )
    require_8_bits(network, product_types(contents), look_up_tables(contents))
    interface = [(spec.name, mlir_type(spec.shape)) for spec in (*network.inputs, *network.outputs)]
    if [*contents.inputs, *contents.outputs] != interface:
        raise ExportError(f"the asset's interface is {[*contents.inputs, *contents.outputs]}, not {interface}")


def mlir_type(shape: tuple[int, ...]) -> str:
    """Of a float32 tensor of this shape."""
    return f"tensor<{''.join(f'{size}x' for size in shape)}f32>"


def declared(mlir: str) -> tuple[str, tuple[int, ...]]:
    """numpy's dtype and the shape of what `mlir_type` writes; an open axis is -1."""
    *sizes, element = mlir.removeprefix("tensor<").removesuffix(">").split("x")
    return NUMPY.get(element, element), tuple(-1 if size == "?" else int(size) for size in sizes)


def facts(contents: AssetContents, precision: Precision) -> dict[str, Any]:
    """What the report says about the asset."""
    norms = sum(operation.graph == FUNCTION and operation.name == "invoke" for operation in contents.operations)
    statistics = precision is not Precision.FP32 and any(one.graph in STATISTICS for one in contents.operations)
    unsuited = unfit(contents.steps)
    return {
        "minimum_os": "27",
        "products": {PRECISIONS.get(name, name): count for name, count in sorted(product_types(contents).items())},
        "composites": norms,
        "operations": counts(contents),
        "look_up_tables": look_up_tables(contents),
        "unfit_for_the_neural_engine": unsuited,
        "notes": [
            *(["a LayerNorm's mean and variance are float32"] if statistics else []),
            *note(unsuited, len(contents.steps)),
        ],
    }
