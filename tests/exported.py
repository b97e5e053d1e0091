"""Artefacts of the bundled networks, exported once in a test run, and what a runner makes of their golden images."""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

import castling_deploy
from castling_deploy.artifact import Folder, read_folder
from castling_deploy.execution import inputs_for
from castling_deploy.parity import TOLERANCES, Reference, Verdict
from castling_deploy.probes import Probes
from castling_deploy.runner import Runner, arithmetic_of
from castling_deploy.task import task_named
from castling_deploy.verification import compared

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values
    from castling_deploy.target import Artifact

CLASSIFIER, DETECTOR = "castling-levit-digits", "castling-levit-digits-detector"
MODEL = "model.onnx"
shared = Path()  # what all workers of a test run see; conftest.py says where


@cache
def exported(model: str, target: str, precision: str, **options: Any) -> Folder:
    """The folder of an export that every test file and worker shares: copy it to change it."""
    home = shared.joinpath("-".join([model, target, precision, *(f"{name}={options[name]}" for name in options)]))
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():  # an export that fails leaves none
            made = home.with_suffix(".new")
            network = castling_deploy.load(model=model)
            castling_deploy.export(network, target=target, precision=precision, output=made, overwrite=True, **options)
            made.rename(home)
    (folder,) = home.iterdir()
    return read_folder(folder)


def copied(folder: Folder, into: Path) -> Path:
    """A copy in the folder `into`, which may be changed, by the name that an export gives it."""
    return Path(shutil.copytree(folder.path, into / folder.path.name))


def damaged(folder: Folder, path: Path) -> Folder:
    """A copy in `path` whose model is cut in the middle."""
    return changed(folder, path, lambda model: model.write_bytes(model.read_bytes()[: model.stat().st_size // 2]))


def with_another_weight(folder: Folder, path: Path) -> Folder:
    """A copy in `path` of which a single weight is another: the largest of the classifier's matrix, negated."""

    def negate(file: Path) -> None:
        model = onnx.load(file)
        weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
        (tensor,) = (weights[name] for name in last_product(model).input if name in weights)
        values = onnx.numpy_helper.to_array(tensor).copy()
        index = np.unravel_index(np.abs(values).argmax(), values.shape)
        values[index] *= -1
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, file)

    return changed(folder, path, negate)


def last_product(model: onnx.ModelProto) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")][-1]


def changed(folder: Folder, path: Path, change: Callable[[Path], object]) -> Folder:
    shutil.copytree(folder.path, path)
    change(path / MODEL)
    return read_folder(path)


def golden_inputs(folder: Folder, count: int = 8) -> Values:
    """The first `count` golden images as the artefact takes them, without the extremes that follow them."""
    images = np.load(folder.path / "golden" / "images.npy")[:count]
    return inputs_for(folder.artifact.inputs[0], Probes.of(images, folder.preprocessing))[: len(images)]


class Apart:
    """A runner in a process of its own, as users run it: its crash is not that of the tests."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            # `float` for `advance`: a callable that the other process knows without this module and torch
            return pool.submit(self._runner.run, folder, artifact, inputs, float).result()


def outputs_of(runner: Runner, folder: Folder, count: int = 8) -> Mapping[str, Values]:
    return runner.run(folder.path, folder.artifact, golden_inputs(folder, count), lambda share: None)


def verdicts(runner: Runner, folder: Folder, count: int = 8) -> dict[str, Verdict]:
    """Of every output, against the golden ones, under the limit of the arithmetic that the runner computes in."""
    outputs = outputs_of(runner, folder, count)
    references = {
        name: Reference(np.load(folder.path / "golden" / f"{name}.npy")[:count], real=count, noise=noise)
        for name, noise in folder.noise.items()
    }
    tolerance = TOLERANCES[arithmetic_of(runner, folder.precision)]
    parities = compared(task_named(folder.task), outputs, references, tolerance, folder.preprocessing.size)
    return {parity.name: parity.verdict for parity in parities}


def passed(verdicts: Mapping[str, Verdict]) -> bool:
    return set(verdicts.values()) == {Verdict.PASS}
