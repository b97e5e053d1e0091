"""Core ML: one model.mlpackage, an ML Program for iOS 17, macOS 14 and later."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castling_deploy.eight_bits import Activations, Quantisation
from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export.attesting import attestation, require_8_bits
from castling_deploy.export.channels_first import Layout, require_layout
from castling_deploy.export.coreml_contents import (
    PRODUCTS,
    classifier_problems,
    contained,
    look_up_tables,
    outputs_of,
    product_types,
)
from castling_deploy.export.coreml_package import classify, describe, distinct, write_package
from castling_deploy.export.coreml_program import converted, exported_program
from castling_deploy.export.coreml_session import EvaluatedSession, PredictSession
from castling_deploy.export.mil_evaluator import load_program
from castling_deploy.export.mil_package import Package, read_package
from castling_deploy.facts import stating
from castling_deploy.palette import require_bits
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

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from castling_deploy.target import Arrays

FILE = "model.mlpackage"
INPUTS = ("tensor", "image")
LABEL, PROBABILITIES, SCORES = "label", "probabilities", "scores"

DTYPES = {Precision.FP16: "FLOAT16", Precision.FP32: "FLOAT32", Precision.INT8: "FLOAT16"}  # computed in, MIL's names
BORDER = frozenset({"cast", "classify"})  # may touch float32 in a float16 program

USAGE = """\
Swift, on iOS 17 or macOS 14 and later:

```swift
import CoreML

let model = try await MLModel.load(contentsOf: MLModel.compileModel(at: packageURL), configuration: .init())
{swift_image}
let output = try await model.prediction(from: MLDictionaryFeatureProvider(dictionary: ["{input}": image]))
let logits = output.featureValue(for: "{output}")!.multiArrayValue!    // {logits} float32
{swift_label}```

Python, on a Mac:

```python
import coremltools

model = coremltools.models.MLModel("model.mlpackage")
output = model.predict({{"{input}": image}})    # image: {python_image}
logits = output["{output}"]
{python_label}```
"""
SCRIPT = f"""\
def run(folder, inputs):
    import sys

    path = folder / "{FILE}"
    if sys.platform != "darwin":  # Core ML itself is on macOS only; castling-deploy has an evaluator of the program
        from castling_deploy.export.mil_evaluator import load_program

        return load_program(path)(inputs)
    import coremltools
    from PIL import Image

    model = coremltools.models.MLModel(str(path))
    pictures = {{name: value.dtype == "uint8" for name, value in inputs.items()}}
    fed = {{name: Image.fromarray(value[0].squeeze()) if pictures[name] else value for name, value in inputs.items()}}
    return model.predict(fed)

"""
SWIFT_IMAGE = {
    "tensor": "let image = try MLMultiArray(shape: {shape}, dataType: .float32)    // fill it with normalised pixels",
    "image": """\
let constraint = model.modelDescription.inputDescriptionsByName["{input}"]!.imageConstraint!
let image = try MLFeatureValue(imageAt: imageURL, constraint: constraint)    // the model normalises""",
}
PYTHON_IMAGE = {"tensor": "{shape} float32, normalised", "image": "a PIL image of {width} x {height} pixels"}
SWIFT_LABEL = 'let label = output.featureValue(for: "label")!.stringValue    // probabilities: a dictionary by label\n'
PYTHON_LABEL = 'label, probabilities = output["label"], output["probabilities"]    # a string, a dictionary by label\n'


@dataclass(frozen=True)
class CoreMLOptions:
    """`input` "tensor" takes normalised float32 (B, C, H, W), "image" raw pixels, which the model normalises itself.

    `palettise` is for int8: weights in a look-up table for each, by an index of so many bits, instead of in levels.
    `layout` is that of the tokens inside: "channels-last" (B, N, C), "channels-first" (B, C, 1, N). Raises UsageError
    for anything else.
    """

    input: Literal["tensor", "image"] = field(default="tensor", metadata={"whole": "interface"})
    palettise: int | None = None
    layout: Layout = "channels-last"

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise UsageError(f"unknown input '{self.input}'", hint=f"use one of: {', '.join(INPUTS)}")
        require_layout(self.layout)
        require_bits(self.palettise)

    @property
    def form(self) -> Quantisation:
        return Quantisation({}, Activations.FLOAT16, palette=self.palettise)


class CoreMLTarget:
    """One model.mlpackage; with known labels and a batch of one a classifier, which keeps its logits.

    Tensors at the interface are float32 in both precisions. In FP16 everything behind the first cast is float16, the
    norms of the attention too: by the evaluator, Castling-DeiT-T at 224 px (random weights) is off by 0.28 % of its
    outputs' spread, and by 0.29 % when every reduction keeps its running sum in float16. That holds because folding
    scales the values: with them as they are, squares pass 65504 and the error is 18 %. INT8 is FP16 with int8 weights.
    """

    name = "coreml"
    file = FILE
    extra = "coreml"
    runtime = "coreml"
    precisions: tuple[Precision, ...] = (Precision.FP16, Precision.FP32, Precision.INT8)
    effort = 15.0
    options: type[Any] = CoreMLOptions
    selftests: Mapping[str, str] = {"selftest.py": "run_coreml.py", "Selftest.swift": "Selftest.swift"}

    def missing(self) -> Missing | None:
        package = find_spec("coremltools")
        if package is None:
            return Missing("coremltools is not installed", "pip install 'castling-deploy[coreml]'")
        folders = [Path(folder) for folder in package.submodule_search_locations or ()]
        if not any(match for folder in folders for match in folder.glob("libmilstoragepython*")):
            return Missing(
                "coremltools has no weight writer here: it was built from source",
                "pip install 'castling-deploy[coreml]', on macOS or on Linux x86-64, which have wheels",
            )
        return None

    def unfinished(self) -> Missing | None:
        return None

    def witness(self) -> Witness:
        if sys.platform == "darwin" and find_spec("coremltools") is not None:
            return Witness(
                f"coremltools {version('coremltools')} predict (macOS {platform.mac_ver()[0]})", WitnessKind.RUNTIME
            )
        return Witness(f"castling-deploy {version('castling-deploy')} MIL evaluator", WitnessKind.REFERENCE)

    def refuse(self, options: CoreMLOptions, batch_size: int) -> None:
        if options.input == "image" and batch_size != 1:
            raise UsageError(
                f"a Core ML image input holds one image, not {batch_size}",
                hint="use --batch-size 1, or --input tensor",
            )

    def lowered(self, network: Network, options: CoreMLOptions) -> nn.Module:
        whole = replace(network, quantisation=None)
        program = exported_program(whole, pixels=False, scores=False, layout=options.layout)
        return program.module(check_guards=False)

    def export(self, network: Network, precision: Precision, options: CoreMLOptions, folder: Path) -> Artifact:
        self.refuse(options, network.inputs[0].shape[0])
        check_network(network, options)
        classes = distinct(network.labels or ()) if classifies(network) else ()
        pixels, scores = options.input == "image", bool(classes)
        artifact = Artifact(
            (FILE,),
            *specs(network, options, classifier=scores),
            tools={name: version(name) for name in ("torch", "coremltools")},
            loads_with=("Core ML on iOS 17 or macOS 14", "coremltools on macOS"),
            usage=usage(network, options, classifier=scores),
        )
        told = stating(network, self.name, precision, options, artifact).metadata
        program = exported_program(network, pixels=pixels, scores=scores, layout=options.layout)
        outputs = (*(spec.name for spec in network.outputs), *([SCORES] if scores else []))
        mlmodel, wide = converted(program, network, precision, pixels=pixels, outputs=outputs)
        model = mlmodel.get_spec()
        if classes:
            classify(model, SCORES, LABEL, PROBABILITIES, classes)
        describe(model, network.description, told, lines(network, options))
        write_package(model, Path(mlmodel.weights_dir), folder / FILE)
        package = read_package(folder / FILE)
        softmaxes = sum("softmax" in str(node.target) for node in program.graph.nodes)
        check(package, precision, softmaxes=softmaxes, wide=wide, part=network.part)
        require_8_bits(network, product_types(package), look_up_tables(package))
        return replace(artifact, details=facts(package, network, classes))

    def attest(self, folder: Path, artifact: Artifact, precision: Precision) -> Attestation:
        package = read_package(folder / FILE)
        weights: Counter[str] = Counter()
        for value in package.constants.values():
            if not isinstance(value, (str, list)):
                weights[value.dtype.name] += value.nbytes
        return attestation(
            artifact,
            precision,
            product_types(package),
            Counter(operation.outputs[0].dtype.lower() for operation in package.operations),
            weights,
            classifier_problems(package),
            package.metadata,
            inputs={feature.name: (feature.dtype, feature.shape) for feature in package.inputs},
            outputs=outputs_of(package),
            details=contained(package),
        )

    @contextmanager
    def load(self, folder: Path, *, threads: int = 1) -> Iterator[Session]:
        """On macOS Core ML itself, which chooses its threads alone; elsewhere the evaluator on `threads`."""
        if sys.platform == "darwin":
            yield PredictSession(folder / FILE, self.witness())
            return
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield EvaluatedSession(load_program(folder / FILE), self.witness())
        finally:
            torch.set_num_threads(before)

    def dequantised(self, folder: Path) -> list[npt.NDArray[np.floating]]:
        return load_program(folder / FILE).made_constants()

    def constants(self, folder: Path) -> Arrays:
        import numpy as np

        held = read_package(folder / FILE).constants
        return {name: value for name, value in held.items() if isinstance(value, np.ndarray)}

    def script(self) -> str:
        return SCRIPT


def check_network(network: Network, options: CoreMLOptions) -> None:
    """Raises UsageError or ExportError for what cannot be built, before anything is imported."""
    channels = network.inputs[0].shape[1]  # tokens, in a part of a network
    order = network.preprocessing.channel_order
    if options.input == "image" and channels != 1 and (channels, order) != (3, "RGB"):
        raise UsageError(f"Core ML has no image of {channels} channels in the order {order}", hint="use --input tensor")
    classes = network.outputs[0].shape[1]
    if classifies(network) and network.labels is not None and len(network.labels) != classes:
        raise ExportError(f"{len(network.labels)} labels for {classes} classes", hint="mend the checkpoint's labels")


def classifies(network: Network) -> bool:
    """Whether the network can be a Core ML classifier: one image at a time, one output, a number per class."""
    return network.inputs[0].shape[0] == 1 and len(network.outputs) == 1 and len(network.outputs[0].shape) == 2


def check(
    package: Package,
    precision: Precision,
    *,
    softmaxes: int,
    wide: frozenset[str] = frozenset(),
    part: bool = False,
) -> None:
    """Raises ExportError unless the saved program is what was asked for; `softmaxes` is what the network itself has.

    `wide` are the names of operations that have to be float32 in a float16 program. A `part` of a network may have no
    product.
    """
    asked = DTYPES[precision]
    operations = [operation for operation in package.operations if operation.name not in wide]
    products = [operation for operation in operations if operation.type in PRODUCTS]
    weights = {
        name
        for operation in products
        for parameter in ("weight", "bias")
        for name in operation.inputs.get(parameter, ())
        if name in package.constants
    }
    wrong = [name for name in sorted(weights) if package.dtype(name) != asked]
    wrong += [
        operation.name
        for operation in operations
        if operation.type not in BORDER
        and operation.outputs[0].dtype in DTYPES.values()
        and operation.outputs[0].dtype != asked
    ]
    if wrong or not (products or part):
        raise ExportError(f"{precision} was asked for, and not built: {', '.join(wrong[:3]) or 'there is no product'}")
    counts = Counter(operation.type for operation in package.operations)
    if counts["batch_norm"] or counts["softmax"] > softmaxes:
        raise ExportError(
            f"the program is not clean: {counts['batch_norm']} batch_norm, {counts['softmax']} softmax "
            f"where the network has {softmaxes}"
        )


def specs(
    network: Network, options: CoreMLOptions, *, classifier: bool
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the artefact."""
    (given,), outputs = network.inputs, network.outputs
    if options.input == "image":
        batch, channels, height, width = given.shape
        given = TensorSpec(given.name, (batch, height, width, channels), "uint8", "NHWC", "image")
    if classifier:
        outputs = (*outputs, TensorSpec(PROBABILITIES, outputs[0].shape, "float32", "NC"))
    return (given,), outputs


def lines(network: Network, options: CoreMLOptions) -> dict[str, str]:
    """What Xcode shows beside each input and output."""
    given = "raw pixels" if options.input == "image" else "(x / 255 - mean) / std of the pixels x"
    return {
        network.inputs[0].name: f"{given}, channels in the order {network.preprocessing.channel_order}",
        "logits": "a number per class, before softmax",
        LABEL: "the most probable class",
        PROBABILITIES: "softmax of the logits, by class",
    }


def usage(network: Network, options: CoreMLOptions, *, classifier: bool) -> str:
    """How to load the package in Swift and in Python, in Markdown."""
    given, logits = network.inputs[0], network.outputs[0]
    facts = {
        "input": given.name,
        "output": logits.name,
        "shape": list(given.shape),
        "logits": list(logits.shape),
        "height": given.shape[-2],
        "width": given.shape[-1],
    }
    return USAGE.format(
        **facts,
        swift_image=SWIFT_IMAGE[options.input].format(**facts),
        python_image=PYTHON_IMAGE[options.input].format(**facts),
        swift_label=SWIFT_LABEL if classifier else "",
        python_label=PYTHON_LABEL if classifier else "",
    )


def facts(package: Package, network: Network, classes: tuple[str, ...]) -> dict[str, Any]:
    """What the report says about the package."""
    batch = network.inputs[0].shape[0]
    if classes:
        classifier = f"{len(classes)} classes"
    elif network.labels is None:
        classifier = "no: the labels are not known"
    elif len(network.outputs) > 1:
        classifier = "no: the network has several outputs"
    else:
        classifier = f"no: Core ML classifies one image at a time, the batch is {batch}"
    return {"minimum_deployment_target": "iOS17", "classifier": classifier, **contained(package)}
