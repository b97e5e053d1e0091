"""The programs in an artefact's folder pass on what was exported, fail on anything else, and need nothing of ours."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import ort_headers
import pytest
from detectors import detector
from networks import small
from torch import nn

import castling_deploy
from castling_deploy.artifact import read_folder
from castling_deploy.errors import SetupError
from castling_deploy.parity import TOLERANCES, Reference, Verdict
from castling_deploy.selftests.facts import Facts, GoldenOutput, golden_output
from castling_deploy.selftests.languages import LANGUAGES
from castling_deploy.selftests.texts import TEMPLATES, texts
from castling_deploy.target import TARGETS, Precision, target_named

CASES = {
    "onnx": ("deit", "onnx", "fp32", {}),
    "onnx-fp16": ("deit", "onnx", "fp16", {}),
    "onnx-batch": ("levit", "onnx", "fp32", {"batch_size": 3}),
    "onnx-dynamic": ("deit", "onnx", "fp32", {"dynamic": True}),
    "onnx-boxes": ("detector", "onnx", "fp32", {"nms": True}),
    "tensorrt": ("deit", "tensorrt", "fp16", {}),
    "executorch": ("deit", "executorch", "fp32", {}),
    "executorch-detector": ("detector", "executorch", "fp16", {"batch_size": 2}),
    "coreai": ("deit", "coreai", "fp32", {}),
    "coreai-fp16": ("deit", "coreai", "fp16", {"batch_size": 2}),
}


def network(name: str, seed: int) -> nn.Module:
    return detector(seed=6 + seed) if name == "detector" else small(name, seed)


Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a case, exported once; of a network with other weights where `seed` is not 0."""
    found: dict[tuple[str, int], Path] = {}

    def export(case: str, seed: int = 0) -> Path:
        name, target, precision, options = CASES[case]
        if target_named(target).missing() is not None:
            pytest.skip(f"{target} is not installed here")
        if (case, seed) not in found:
            output = tmp_path_factory.mktemp(case)
            result = castling_deploy.export(
                network(name, seed), target=target, precision=precision, output=output, **options
            )
            assert result.path is not None
            found[case, seed] = result.path
        return found[case, seed]

    return export


SLOW = ("executorch-detector",)  # a minute and a half to export


@pytest.fixture(params=[pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def artefact(request: pytest.FixtureRequest, made: Made) -> Path:
    return made(request.param)


@pytest.fixture
def copy(artefact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artefact, tmp_path / "copy"))


def run(path: Path, cwd: Path) -> tuple[int, list[str]]:
    """selftest.py, elsewhere, where castling-deploy cannot be imported: exit code and lines of stdout."""
    program = path / "selftest" / "selftest.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    hide = f"import sys, runpy; sys.modules['castling_deploy'] = None; sys.argv = [{str(program)!r}]; "
    command = [sys.executable, "-P", "-c", hide + f"runpy.run_path({str(program)!r}, run_name='__main__')"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    return process.returncode, process.stdout.splitlines()


def test_it_passes_with_the_number_and_leaves_the_folder_as_it_was(artefact: Path, tmp_path: Path) -> None:
    code, lines = run(artefact, tmp_path)
    assert (code, lines[-1]) == (0, "PASS"), lines
    golden = json.loads((artefact / "manifest.json").read_text())["golden"]["outputs"]
    judged = [match for line in lines if (match := re.fullmatch(r"(\w+): rel (\S+), limit (\S+)", line))]
    assert [match[1] for match in judged] == [output["name"] for output in golden]
    assert all(0 <= float(match[2]) <= float(match[3]) * 1.05 for match in judged)
    assert read_folder(artefact).changed() == ()


def test_its_numbers_are_those_of_verify(artefact: Path, tmp_path: Path) -> None:
    _, lines = run(artefact, tmp_path)
    golden = castling_deploy.verify(artefact).golden[0]
    said = dict(re.findall(r"(\w+): rel (\S+),", "\n".join(lines)))
    for output in golden.outputs:
        if output.name in said and output.rel is not None:
            assert float(said[output.name]) == pytest.approx(output.rel, rel=0.01, abs=2e-7)
    assert Verdict.FAIL not in {output.verdict for output in golden.outputs}


def test_it_fails_where_a_golden_image_was_exchanged(copy: Path, tmp_path: Path) -> None:
    images = np.load(copy / "golden" / "images.npy")
    images[0] = images[1]
    np.save(copy / "golden" / "images.npy", images)
    code, lines = run(copy, tmp_path)
    assert (code, lines[-1]) == (1, "FAIL"), lines


def test_it_fails_on_a_model_that_does_not_load(copy: Path, tmp_path: Path) -> None:
    model = next(copy.glob("model.[op]*"), copy / "model.aimodel" / "main.mlirb")
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 3])
    code, lines = run(copy, tmp_path)
    assert (code, lines[-1]) == (1, "FAIL"), lines


def test_it_fails_on_outputs_that_are_not_finite_or_of_another_shape(made: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(made("onnx"), tmp_path / "copy")
    values = np.load(copy / "golden" / "logits.npy")
    for wrong in (np.full_like(values, np.nan), values[..., :-1]):
        np.save(copy / "golden" / "logits.npy", wrong)
        code, lines = run(copy, tmp_path)
        assert (code, lines[-1]) == (1, "FAIL"), lines


@pytest.mark.parametrize("case", ["onnx", "executorch", "onnx-boxes", "coreai"])
def test_it_fails_on_another_networks_model(case: str, made: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(made(case), tmp_path / "copy")
    model = read_folder(copy).artifact.files[0]
    other = made(case, seed=1) / model
    shutil.copytree(other, copy / model, dirs_exist_ok=True) if other.is_dir() else shutil.copyfile(other, copy / model)
    code, lines = run(copy, tmp_path)
    assert (code, lines[-1]) == (1, "FAIL"), lines


@pytest.mark.parametrize("input", ["tensor", "image"])
def test_without_its_platform_it_says_so_and_does_not_pass(input: str, tmp_path: Path) -> None:
    if target_named("coreml").missing() is not None:
        pytest.skip("coremltools is not installed here")
    result = castling_deploy.export(small("deit"), target="coreml", precision="fp16", output=tmp_path, input=input)
    assert result.path is not None
    code, lines = run(result.path, tmp_path)
    if sys.platform == "darwin":
        assert (code, lines[-1]) == (0, "PASS")
        return
    assert code == 2 and lines == ["not run: Core ML is on macOS alone; run this file on a Mac"]
    swift = (result.path / "selftest" / "Selftest.swift").read_text()
    assert f"let takesPixels = {str(input == 'image').lower()}" in swift and "NOT RUN where it was written" in swift
    assert "Never run where it was written" in (result.path / "selftest" / "README.md").read_text()


# C++


@pytest.fixture(scope="module")
def onnxruntime_sdk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Headers, and the library of the Python package."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    try:
        include = ort_headers.headers()
    except SetupError as error:
        pytest.skip(f"ONNX Runtime's headers are not here: {error}")
    package = Path(import_module("onnxruntime").__file__ or "").parent
    libraries = [*package.glob("capi/libonnxruntime.so.*"), *package.glob("capi/libonnxruntime.*.dylib")]
    if not libraries:
        pytest.skip("onnxruntime's wheel has no shared library here")
    lib = tmp_path_factory.mktemp("lib")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (lib / name).symlink_to(libraries[0])
    return include, lib


@pytest.mark.parametrize("case", [case for case, (_, target, *_) in CASES.items() if target == "onnx"])
def test_the_cpp_program_passes_on_the_artefact_and_fails_on_anything_else(
    case: str, made: Made, onnxruntime_sdk: tuple[Path, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(made(case), tmp_path / "copy")
    headers, lib = onnxruntime_sdk
    program = tmp_path / "program"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", headers, "-L", lib]
    source = path / "selftest" / "selftest.cpp"
    subprocess.run(["g++", *flags, source, f"-Wl,-rpath,{lib}", "-lonnxruntime", "-o", program], check=True)

    def says(folder: Path) -> tuple[int, list[str]]:
        process = subprocess.run([program, folder], capture_output=True, text=True)
        return process.returncode, process.stdout.splitlines()

    code, lines = says(path)
    assert (code, lines[-1]) == (0, "PASS"), lines
    python = run(path, tmp_path)[1]
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in python]
    images, first = np.load(path / "golden" / "images.npy"), path / "golden" / f"{lines[0].partition(':')[0]}.npy"
    values = np.load(first)
    for name, wrong in (
        (path / "golden" / "images.npy", np.roll(images, 1, axis=0)),
        (first, np.where(values == values.max(), np.nan, values).astype(np.float32)),
        (first, values[:-1]),
        (first, values.astype(np.float64)),
    ):
        kept = name.read_bytes()
        np.save(name, wrong)
        code, lines = says(path)
        name.write_bytes(kept)
        assert (code, lines[-1]) == (1, "FAIL"), lines
    for name in (path / "model.onnx", first):
        kept = name.read_bytes()
        name.write_bytes(kept[: len(kept) // 2])
        code, lines = says(path)
        name.write_bytes(kept)
        assert (code, lines[-1]) == (1, "FAIL"), lines
    assert says(path)[0] == 0 and says(tmp_path)[0] == 1


# Texts

FACTS = Facts(
    "model.x",
    "image",
    "image",
    "float32",
    2,
    (0.485, 1e-7),
    (0.229, 2.0),
    ("one_stride_8", "two", "boxes"),
    (
        GoldenOutput("one_stride_8", "one_stride_8.npy", (1.5, 2e-12), 1e-4),
        GoldenOutput("two", "two.npy", (3.0,), 0.02),
    ),
)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_a_self_test_in_python_and_names_templates_that_exist(name: str) -> None:
    target = target_named(name)
    assert "selftest.py" in target.selftests
    written = texts(target.selftests, FACTS)
    assert written.keys() == {*target.selftests, "README.md"}
    for file, text in written.items():
        assert file == "README.md" or file in written["README.md"]
        assert "<facts>" not in text and "<runtime>" not in text and "import castling" not in text
        if file.endswith(".py"):
            compile(text, file, "exec")
            assert "NotImplementedError" not in text


def test_every_template_belongs_to_a_target() -> None:
    named = {template for name in TARGETS for template in target_named(name).selftests.values()}
    assert {path.name for path in TEMPLATES.iterdir() if path.is_file()} == {*named, "selftest.py"}


def faults(language: str, text: str) -> Iterator[str]:
    """Where the grammar does not fit."""
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip(f"tree_sitter_{language}")
    nodes = [tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(text.encode()).root_node]
    while nodes:
        node = nodes.pop()
        if node.type == "ERROR" or node.is_missing:
            yield f"line {node.start_point[0] + 1}: {node.text[:40]}"
        nodes += node.children


@pytest.mark.parametrize(
    ("language", "target", "file"), [("swift", "coreml", "Selftest.swift"), ("kotlin", "executorch", "Selftest.kt")]
)
def test_what_cannot_be_run_here_is_at_least_the_language(language: str, target: str, file: str) -> None:
    text = texts(target_named(target).selftests, FACTS)[file]
    assert list(faults(language, text)) == []
    assert list(faults(language, text.replace("{", "(", 1))) != [], "the grammar tells"


@pytest.mark.parametrize("suffix", LANGUAGES)
def test_the_constants_hold_every_fact(suffix: str) -> None:
    text = LANGUAGES[suffix](FACTS)
    for number in (0.485, 1e-7, 0.229, 1.5, 2e-12, 1e-4, 0.02):
        assert repr(number) in text
    for word in ("model.x", "one_stride_8.npy", "two"):
        assert f'"{word}"' in text


def test_python_reads_its_constants_back() -> None:
    space: dict[str, object] = {}
    exec(LANGUAGES[".py"](FACTS), space)
    golden = [(each.name, each.file, list(each.spreads), each.limit) for each in FACTS.golden]
    assert space["GOLDEN"] == golden and space["OUTPUTS"] == list(FACTS.outputs) and space["BATCH"] == 2
    assert space["MEAN"] == list(FACTS.mean) and space["IMAGE_INPUT"] is True
    other = dataclasses.replace(FACTS, content="tensor")
    exec(LANGUAGES[".py"](other), space)
    assert space["IMAGE_INPUT"] is False


def test_spreads_and_limit_judge_as_parity_does() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 4, 3)).astype(np.float32)
    values[5] *= 20  # its output lies farther from the others than they from each other
    tolerance = TOLERANCES[Precision.FP16]
    reference = Reference(values, 6, noise=1e-6)
    golden = golden_output(reference, "x", tolerance)
    actual = values + rng.normal(scale=0.01, size=values.shape).astype(np.float32)
    errors = np.abs(actual.astype(np.float64) - values).reshape(6, -1).max(1)
    assert (errors / golden.spreads).max() == pytest.approx(reference.rel(actual, values))
    assert golden.spreads[5] > 2 * golden.spreads[0] and golden.limit >= tolerance.limit
    assert golden_output(Reference(values[:1], 1, 0.0), "x", tolerance).spreads == (0.0,)
