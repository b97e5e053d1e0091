"""The Python interface does what the command does, on numpy arrays and torch modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SMALL_DEIT, conditioned, small

import castling_deploy
from castling_deploy.errors import CastlingError, CheckpointError, ParityError, ShapeError, UsageError
from castling_deploy.models.deit import CastlingDeiT

Files = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint_file: Files) -> Path:
    network = castling_deploy.load(checkpoint_file("levit"))
    result = castling_deploy.export(network, target="onnx", output=tmp_path_factory.mktemp("api"), batch_size=2)
    assert result.path is not None
    return result.path


def test_load_castle_and_fold_give_networks_and_change_none(checkpoint_file: Files) -> None:
    network = castling_deploy.load(checkpoint_file("deit"))
    castled = castling_deploy.castle(network)
    folded = castling_deploy.fold(castled)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(network(x), castled(x))
    torch.testing.assert_close(folded(x), castled(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["trained", "castled", "folded", "in memory"])
def test_a_network_can_be_exported_at_every_stage(stage: str, tmp_path: Path, checkpoint_file: Files) -> None:
    network = small("deit") if stage == "in memory" else castling_deploy.load(checkpoint_file("deit"))
    if stage in ("castled", "folded"):
        network = castling_deploy.castle(network)
    if stage == "folded":
        network = castling_deploy.fold(network)
    result = castling_deploy.export(network, target="onnx", output=tmp_path)
    assert result.parity is not None and result.parity.verdict == "pass"


def test_an_open_artefact_takes_pixels_or_its_own_input_and_any_batch(exported: Path, checkpoint_file: Files) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    network = castling_deploy.castle(castling_deploy.load(checkpoint_file("levit")))
    model = castling_deploy.open(exported)
    normalised = model.folder.preprocessing.normalised(pixels)
    expected = network(torch.from_numpy(normalised)).numpy()
    np.testing.assert_allclose(model(pixels), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model(normalised), expected, rtol=1e-3, atol=1e-4)
    assert model.outputs(pixels).keys() == {"logits"}
    model.close()


def test_printing_works_while_an_artefact_is_open(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with castling_deploy.open(exported) as model:
        print("before")
        model(np.zeros((1, 64, 64, 3), np.uint8))
        print("after")
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("shape", [(1, 63, 64, 3), (1, 3, 64, 64), (64, 64, 3)])
def test_images_of_a_wrong_shape_are_refused(shape: tuple[int, ...], exported: Path) -> None:
    with castling_deploy.open(exported) as model, pytest.raises(ShapeError):
        model(np.zeros(shape, np.uint8))
    with castling_deploy.open(exported) as model, pytest.raises(ShapeError):
        model(np.zeros(shape, np.float64))


def test_misuse_is_an_error_of_ours(tmp_path: Path, checkpoint_file: Files) -> None:
    with pytest.raises(UsageError, match="no option --opset"):
        castling_deploy.export(small("deit"), target="coreml", output=tmp_path, opset=20)
    with pytest.raises(CheckpointError):
        castling_deploy.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no Castling network"):
        castling_deploy.export(torch.nn.Linear(3, 3), target="onnx", output=tmp_path)
    with pytest.raises(CastlingError):
        castling_deploy.open(tmp_path)


def test_verify_refuses_another_checkpoint(exported: Path, checkpoint_file: Files) -> None:
    with pytest.raises(ParityError, match="is not the checkpoint"):
        castling_deploy.verify(exported, checkpoint_file("deit"))


def test_benchmark_gives_raw_times(exported: Path) -> None:
    timing = castling_deploy.benchmark(exported)
    assert timing.median_s > 0 and len(timing.times_s) >= 10


def test_a_rectangular_network_built_in_python_keeps_its_size_and_threshold(tmp_path: Path) -> None:
    network = conditioned(CastlingDeiT(replace(SMALL_DEIT, image_size=(16, 64), aux_threshold=0.5)))
    result = castling_deploy.export(network, target="onnx", output=tmp_path)
    assert result.path is not None
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["inputs"][0]["shape"] == [1, 3, 16, 64]
    assert manifest["model"]["config"]["aux_threshold"] == 0.5


def test_changed_weights_are_no_longer_those_of_the_checkpoint(tmp_path: Path, checkpoint_file: Files) -> None:
    network = castling_deploy.load(checkpoint_file("deit"))
    network.get_parameter("head.bias").data += 1
    result = castling_deploy.export(network, target="onnx", output=tmp_path)
    assert result.path is not None
    assert json.loads((result.path / "manifest.json").read_text())["checkpoint"]["sha256"] is None


def test_what_an_earlier_cast_cost_is_not_called_nothing(tmp_path: Path, checkpoint_file: Files) -> None:
    castled = castling_deploy.castle(castling_deploy.load(checkpoint_file("deit")))
    result = castling_deploy.export(castled, target="onnx", output=tmp_path)
    assert result.parity is not None
    cast = result.parity.rungs[0]
    assert (cast.name, cast.rel, cast.verdict) == ("cast", None, "inconclusive")


def test_a_network_in_training_mode_and_an_empty_batch_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training mode"):
        castling_deploy.export(small("deit").train(), target="onnx", output=tmp_path)
    with castling_deploy.open(exported) as model, pytest.raises(ShapeError):
        model(np.zeros((0, 64, 64, 3), np.uint8))
