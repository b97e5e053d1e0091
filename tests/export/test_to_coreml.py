"""Core ML packages: what they compute, what they hold, and that they are the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import numpy.typing as npt
import pytest
import torch
from folded_networks import folded_network, logits_of, network_of
from torch import nn

from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export.coreml_package import classify, distinct
from castling_deploy.export.mil_evaluator import load_program
from castling_deploy.export.mil_package import Package, read_package
from castling_deploy.export.to_coreml import CoreMLOptions, CoreMLTarget, check
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.target import Artifact, Network, Precision, TensorSpec, WitnessKind

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENSOR, IMAGE = CoreMLOptions(), CoreMLOptions("image")
Built = tuple[Network, Artifact, Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Exports a network once per precision and options: (network, artefact, folder)."""
    made: dict[tuple[Any, ...], Built] = {}

    def build(
        name: str = "deit",
        precision: Precision = Precision.FP32,
        options: CoreMLOptions = TENSOR,
        labels: tuple[str, ...] | None = None,
        batch: int = 1,
    ) -> Built:
        key = (name, precision, options, labels, batch)
        if key not in made:
            network = replace(folded_network(name, batch), labels=labels)
            folder = tmp_path_factory.mktemp("coreml")
            made[key] = network, CoreMLTarget().export(network, precision, options, folder), folder
        return made[key]

    return build


def outputs_of(folder: Path, inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    with CoreMLTarget().load(folder) as session:
        parts = [session({"image": np.ascontiguousarray(inputs[index : index + 1])}) for index in range(len(inputs))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def pixels(network: Network, count: int = 4) -> npt.NDArray[np.uint8]:
    height, width = network.preprocessing.size
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- what a package computes


@pytest.mark.parametrize("name", ["deit", "deit-distilled", "levit"])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_package_computes_what_torch_computes(export: Callable[..., Built], name: str, precision: Precision) -> None:
    network, _, folder = export(name, precision)
    images = network.preprocessing.normalised(pixels(network))
    wanted = logits_of(network, images)
    error = np.abs(outputs_of(folder, images)["logits"] - wanted).max() / np.ptp(wanted)
    assert error < (1e-5 if precision is Precision.FP32 else 2e-2)
    assert precision is Precision.FP32 or error > 1e-5  # the evaluator rounds: a float32 package would be seen


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_image_package_normalises_as_preprocessing_does(export: Callable[..., Built], precision: Precision) -> None:
    network, artifact, folder = export("deit", precision, IMAGE)
    assert artifact.inputs == (TensorSpec("image", (1, 32, 32, 3), "uint8", "NHWC", "image"),)
    images = pixels(network)
    images[0], images[1] = 0, 255
    wanted = logits_of(network, network.preprocessing.normalised(images))
    error = np.abs(outputs_of(folder, images)["logits"] - wanted).max() / np.ptp(wanted)
    assert error < (1e-5 if precision is Precision.FP32 else 2e-2)
    assert {"sub", "mul"} <= set(artifact.details["operations"])


def test_a_network_of_one_channel_takes_a_grayscale_image(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 10)).eval()
    network = replace(
        network_of(module, (8, 8)),
        inputs=(TensorSpec("image", (1, 1, 8, 8), "float32", "NCHW"),),
        preprocessing=Preprocessing((8, 8), mean=(0.5,), std=(0.25,)),
    )
    artifact = CoreMLTarget().export(network, Precision.FP32, IMAGE, tmp_path)
    assert artifact.inputs[0].shape == (1, 8, 8, 1)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    wanted = logits_of(network, network.preprocessing.normalised(images))
    np.testing.assert_allclose(outputs_of(tmp_path, images)["logits"], wanted, atol=1e-5)


def test_a_batch_is_kept(export: Callable[..., Built]) -> None:
    network, artifact, folder = export(batch=3)
    images = network.preprocessing.normalised(pixels(network, 3))
    with CoreMLTarget().load(folder) as session:
        np.testing.assert_allclose(session({"image": images})["logits"], logits_of(network, images), atol=1e-4)
    assert artifact.outputs[0].shape == (3, 10)


# -- classifiers


def test_known_labels_make_a_classifier_that_keeps_its_logits(export: Callable[..., Built]) -> None:
    network, artifact, folder = export(labels=LABELS)
    images = network.preprocessing.normalised(pixels(network))
    wanted = torch.from_numpy(logits_of(network, images))
    got = outputs_of(folder, images)
    assert [spec.name for spec in artifact.outputs] == list(got) == ["logits", "probabilities"]
    np.testing.assert_allclose(got["logits"], wanted.numpy(), atol=1e-4)
    np.testing.assert_allclose(got["probabilities"], wanted.softmax(-1).numpy(), atol=1e-6)
    raw = load_program(folder / "model.mlpackage")({"image": images[:1]})
    assert raw["label"] == LABELS[int(wanted[0].argmax())] and list(raw["probabilities"]) == list(LABELS)


def test_a_classifier_is_written_as_coremltools_writes_one() -> None:
    """coremltools can make a classifier of a network with one output: there both have to agree."""
    program = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), (torch.randn(1, 4),))

    def converted(**asked: Any) -> Any:
        return ct.convert(
            program.run_decompositions({}),
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
            compute_precision=ct.precision.FLOAT32,
            **asked,
        ).get_spec()

    theirs = converted(classifier_config=ct.ClassifierConfig(["a", "b", "c"], predicted_feature_name="label"))
    ours = converted(outputs=[ct.TensorType(name="scores")])
    classify(ours, "scores", "label", "label_probs", ["a", "b", "c"])

    def step(model: Any) -> Any:
        function = model.mlProgram.functions["main"]
        operation = function.block_specializations[function.opset].operations[-1]
        operation.inputs["probabilities"].arguments[0].name = "scores"
        operation.attributes["name"].Clear()
        return operation

    assert step(ours) == step(theirs) and step(ours).type == "classify"
    assert {feature.name: feature for feature in ours.description.output} == {
        feature.name: feature for feature in theirs.description.output
    }
    assert ours.description.predictedFeatureName == theirs.description.predictedFeatureName
    assert ours.description.predictedProbabilitiesName == theirs.description.predictedProbabilitiesName


def test_labels_that_occur_twice_are_told_apart() -> None:
    assert distinct(["crane", "crow", "crane"]) == ("crane (0)", "crow", "crane (2)")


def test_a_batch_has_no_classifier_and_says_so(export: Callable[..., Built]) -> None:
    _, artifact, _ = export(labels=LABELS, batch=2)
    assert [spec.name for spec in artifact.outputs] == ["logits"] and "classify" not in artifact.details["operations"]
    assert artifact.details["classifier"] == "no: Core ML classifies one image at a time, the batch is 2"


# -- what a package holds


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.FP16, np.float16), (Precision.FP32, np.float32)])
def test_weights_have_the_precision_and_the_interface_is_float32(
    export: Callable[..., Built], precision: Precision, dtype: type[np.generic]
) -> None:
    _, artifact, folder = export("levit", precision)
    package = read_package(folder / "model.mlpackage")
    weights = [value for value in package.constants.values() if isinstance(value, np.ndarray) and value.size > 16]
    assert weights and all(value.dtype == dtype for value in weights if value.dtype.kind == "f")
    assert {feature.dtype for feature in (*package.inputs, *package.outputs)} == {"float32"}
    assert {spec.dtype for spec in (*artifact.inputs, *artifact.outputs)} == {"float32"}
    assert package.specification_version == artifact.details["specification_version"] == 8


def test_a_package_of_another_precision_or_with_a_softmax_too_many_is_refused(export: Callable[..., Built]) -> None:
    def of(precision: Precision) -> Package:
        return read_package(export("levit", precision)[2] / "model.mlpackage")

    check(of(Precision.FP16), Precision.FP16, softmaxes=2)
    for built, asked in ((Precision.FP32, Precision.FP16), (Precision.FP16, Precision.FP32)):
        with pytest.raises(ExportError, match=f"{asked} was asked for, and not built"):
            check(of(built), asked, softmaxes=2)
    with pytest.raises(ExportError, match="2 softmax where the network has 1"):
        check(of(Precision.FP32), Precision.FP32, softmaxes=1)


def test_one_float32_operation_in_a_float16_package_is_refused(export: Callable[..., Built]) -> None:
    package = read_package(export("deit", Precision.FP16)[2] / "model.mlpackage")
    operations = [
        replace(step, outputs=(replace(step.outputs[0], dtype="FLOAT32"),)) if step.type == "reduce_l2_norm" else step
        for step in package.operations
    ]
    with pytest.raises(ExportError, match="fp16 was asked for, and not built"):
        check(replace(package, operations=tuple(operations)), Precision.FP16, softmaxes=0)


def test_a_package_holds_the_facts_and_no_date(export: Callable[..., Built]) -> None:
    network, artifact, folder = export(labels=LABELS)
    model = ct.models.MLModel(str(folder / "model.mlpackage"), skip_model_load=True)  # coremltools reads it again
    assert model.short_description == network.description
    assert dict(network.metadata).items() <= dict(model.user_defined_metadata).items()
    assert not any("date" in key for key in model.user_defined_metadata)
    assert model.input_description["image"].startswith("(x / 255 - mean) / std")
    assert list(hashes(folder / "model.mlpackage")) == [
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
        "Manifest.json",
    ]
    assert artifact.files == ("model.mlpackage",) and "let logits" in artifact.usage and "[1, 10]" in artifact.usage


def test_the_share_of_subnormal_weights_is_told(tmp_path: Path) -> None:
    linear = nn.Linear(192, 10)
    linear.weight.data.fill_(1.0)
    linear.weight.data[0] = 2.0**-15
    module = nn.Sequential(nn.Flatten(), linear).eval()
    artifact = CoreMLTarget().export(network_of(module, (8, 8)), Precision.FP16, TENSOR, tmp_path)
    assert artifact.details["subnormal_weights"] == pytest.approx(192 / (192 * 10 + 10), abs=1e-6)


EXPORT = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from folded_networks import folded_network
from dataclasses import replace
from castling_deploy.export.to_coreml import CoreMLOptions, CoreMLTarget
from castling_deploy.target import Precision
network = replace(folded_network("levit"), labels=tuple(sys.argv[2].split()))
CoreMLTarget().export(network, Precision.FP16, CoreMLOptions("image"), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(export: Callable[..., Built], tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), " ".join(LABELS)],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        env={"PYTHONHASHSEED": "1"},
    )
    assert hashes(tmp_path) == hashes(export("levit", Precision.FP16, IMAGE, LABELS)[2])


# -- what is refused, and what is missing


def test_an_unknown_input_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown input 'video'"):
        CoreMLOptions("video")  # type: ignore[arg-type]


def test_images_come_one_at_a_time_and_in_colours_that_core_ml_knows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds one image, not 2"):
        CoreMLTarget().export(folded_network("deit", 2), Precision.FP16, IMAGE, tmp_path)
    network = folded_network("deit")
    swapped = replace(network, preprocessing=replace(network.preprocessing, channel_order="BGR"))
    with pytest.raises(UsageError, match="3 channels in the order BGR"):
        CoreMLTarget().export(swapped, Precision.FP16, IMAGE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_labels_have_to_be_as_many_as_classes(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="9 labels for 10 classes"):
        CoreMLTarget().export(replace(folded_network("deit"), labels=LABELS[1:]), Precision.FP16, TENSOR, tmp_path)


def test_a_network_that_cannot_be_traced_is_an_export_error(tmp_path: Path) -> None:
    class Undecided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export refuses the network"):
        CoreMLTarget().export(network_of(Undecided(), (8, 8)), Precision.FP16, TENSOR, tmp_path)


def test_an_operation_that_coremltools_lacks_is_an_export_error(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Upsample(size=(7, 7), mode="bicubic"), nn.Flatten(), nn.Linear(147, 10)).eval()
    with pytest.raises(ExportError, match="coremltools refuses the network"):
        CoreMLTarget().export(network_of(module, (8, 8)), Precision.FP16, TENSOR, tmp_path)


def test_nothing_is_missing_here_and_no_toolchain_is_imported_to_say_so() -> None:
    code = (
        "import sys; from castling_deploy.export.to_coreml import CoreMLTarget; target = CoreMLTarget(); "
        "print(target.missing(), target.unfinished(), target.witness().kind, "
        "{'torch', 'numpy', 'coremltools'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["None", "None", "reference", "set()"]


def test_a_missing_toolchain_is_told_with_the_line_that_mends_it() -> None:
    code = (
        "import json, sys; sys.modules['coremltools'] = None; "
        "from castling_deploy.export.to_coreml import CoreMLTarget; m = CoreMLTarget().missing(); "
        "print(json.dumps([m.reason, m.fix]))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == ["coremltools is not installed", "pip install 'castling-deploy[coreml]'"]


def test_loading_sets_threads_for_as_long_as_the_session_lives(export: Callable[..., Built]) -> None:
    folder = export()[2]
    before = torch.get_num_threads()
    with CoreMLTarget().load(folder, threads=before + 1) as session:
        assert torch.get_num_threads() == before + 1
        assert session.witness.kind is WitnessKind.REFERENCE and "MIL evaluator" in session.witness.name
    assert torch.get_num_threads() == before


def test_a_folder_without_a_package_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no \.mlpackage"), CoreMLTarget().load(tmp_path):
        pass


def test_labels_that_look_like_numbered_ones_stay_distinct() -> None:
    assert distinct(("a", "a", "a (0)", "b")) == ("a (0) (0)", "a (1)", "a (0) (2)", "b")
