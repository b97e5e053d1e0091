"""Writes an .mlpackage that is the same bytes for the same network, and makes an ML Program a classifier.

coremltools' own `save` puts random identifiers, today's date and an ExecuTorch side file into a package.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUNDLE = "com.apple.CoreML"
ITEMS = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
DATE = "com.github.apple.coremltools.conversion_date"


def write_package(model: Any, weights: Path, path: Path) -> None:
    """The package `path` of a Model message and the folder of its weight file, `weights`."""
    data = path / "Data" / BUNDLE
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    if (weights / "weight.bin").is_file():  # coremltools writes none for a part of a network without large constants
        shutil.copyfile(weights / "weight.bin", data / "weights" / "weight.bin")
    identifiers = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{BUNDLE}/{name}")) for name in ITEMS}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "rootModelIdentifier": identifiers["model.mlmodel"],
        "itemInfoEntries": {
            identifiers[name]: {"author": BUNDLE, "description": description, "name": name, "path": f"{BUNDLE}/{name}"}
            for name, description in ITEMS.items()
        },
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True))


def describe(model: Any, description: str, metadata: Mapping[str, str], features: Mapping[str, str]) -> None:
    """In place: what Xcode shows of a model, and the line of each feature that has one; no date."""
    about = model.description.metadata
    about.shortDescription = description
    about.author, about.license = metadata.get("author", ""), metadata.get("license", "")
    about.versionString = metadata.get("version", "")
    about.userDefined.pop(DATE, None)
    about.userDefined.update(metadata)
    for feature in (*model.description.input, *model.description.output):
        feature.shortDescription = features.get(feature.name, "")


def classify(model: Any, scores: str, label: str, probabilities: str, classes: Sequence[str]) -> None:
    """In place: the output `scores` (1, classes) becomes a dictionary `probabilities`, with the best class in `label`.

    ct.ClassifierConfig does that to networks of one output only: beside a second output coremltools 9.0 fails with an
    IndexError (backend/mil/load.py, get_func_output: one output type per output before the classifier was added).
    """
    from coremltools.proto import MIL_pb2

    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operation = block.operations.add(type="classify")
    operation.attributes["name"].CopyFrom(_string(label))
    operation.inputs["probabilities"].arguments.add(name=scores)
    labels = operation.inputs["classes"].arguments.add().value
    labels.type.listType.type.tensorType.dataType = MIL_pb2.STRING
    labels.type.listType.length.constant.size = len(classes)
    labels.immediateValue.list.values.extend(_string(text) for text in classes)
    operation.outputs.add(name=label).type.tensorType.dataType = MIL_pb2.STRING
    table = operation.outputs.add(name=probabilities).type.dictionaryType
    table.keyType.tensorType.dataType, table.valueType.tensorType.dataType = MIL_pb2.STRING, MIL_pb2.FLOAT64
    block.outputs.remove(scores)
    block.outputs.extend([label, probabilities])

    described = model.description
    kept = [feature for feature in described.output if feature.name != scores]
    del described.output[:]
    described.output.extend(kept)
    described.output.add(name=label).type.stringType.SetInParent()
    described.output.add(name=probabilities).type.dictionaryType.stringKeyType.SetInParent()
    described.predictedFeatureName, described.predictedProbabilitiesName = label, probabilities


def distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels, those that occur more than once with their index: "crane (134)". A dictionary holds a key once."""
    occurs = Counter(labels)
    while max(occurs.values(), default=1) > 1:  # again where a label looked like a numbered one
        labels = [f"{label} ({index})" if occurs[label] > 1 else label for index, label in enumerate(labels)]
        occurs = Counter(labels)
    return tuple(labels)


def _string(text: str) -> Any:
    from coremltools.proto import MIL_pb2

    value = MIL_pb2.Value()
    value.type.tensorType.dataType = MIL_pb2.STRING
    value.immediateValue.tensor.strings.values.append(text)
    return value
