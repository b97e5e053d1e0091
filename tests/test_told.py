"""What the user says of a checkpoint, and its file does not: taken, written into the manifest, and taken again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deployments import castling
from networks import dense, small

import castling_deploy
from castling_deploy.castle import measure_cast
from castling_deploy.checkpoint import read
from castling_deploy.errors import CheckpointError
from castling_deploy.identify import identify

Tensors = dict[str, torch.Tensor]
CURRENT, AVERAGE = small("deit").state_dict(), small("deit", 1).state_dict()


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def is_current(network: torch.nn.Module) -> bool:
    return torch.equal(network.get_parameter("head.weight"), CURRENT["head.weight"])


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    torch.save({"state_dict": CURRENT, "state_dict_ema": AVERAGE, "epoch": 3}, tmp_path / "last.pth.tar")
    return tmp_path / "last.pth.tar"


def test_a_container_is_taken_rather_than_the_average_and_reported(timm_file: Path) -> None:
    assert not is_current(castling_deploy.load(timm_file))
    network: Any = castling_deploy.load(timm_file, weights="state_dict")
    assert is_current(network) and network.card.told.weights == "state_dict"
    assert network.card.peeled == ("container 'state_dict', asked for rather than 'state_dict_ema'",)
    assert not is_current(castling_deploy.load(timm_file, weights="state_dict_ema"))


CHOSEN: dict[str, Any] = {
    "a container that nobody knows": {"student": CURRENT, "teacher": AVERAGE},
    "a prefix": {**under("student.", CURRENT), **under("teacher.", AVERAGE)},
    "a prefix in a container": {"state_dict": {**under("student.", CURRENT), **under("teacher.", AVERAGE)}},
    "a prefix in a wrapper": {**under("module.student.", CURRENT), **under("module.teacher.", AVERAGE)},
    "a wrapper in a prefix": {**under("student.module.", CURRENT), **under("teacher.", AVERAGE)},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_one_of_several_networks_is_taken_by_its_name(name: str, tmp_path: Path) -> None:
    torch.save(CHOSEN[name], tmp_path / "c.pth")
    with pytest.raises(CheckpointError) as caught:
        identify(read(tmp_path / "c.pth"))
    assert "--weights" in str(caught.value.hint) and "student" in str(caught.value.hint)
    assert is_current(identify(read(tmp_path / "c.pth", "student"))[0])
    assert not is_current(identify(read(tmp_path / "c.pth", "teacher"))[0])


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"state_dict": CURRENT, "state_dict_ema": AVERAGE, "optimizer": {"state": {}}}, "state_dict, state_dict_ema"),
        ({**under("student.", CURRENT), **under("teacher.", AVERAGE)}, "student, teacher"),
    ],
)
def test_a_name_that_the_file_does_not_have_is_refused_with_those_it_has(
    content: Any, names: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="has no weights 'ema'") as caught:
        read(tmp_path / "c.pth", "ema")
    assert names in str(caught.value.hint)


def test_an_artefact_is_compared_with_the_weights_that_it_was_exported_from(timm_file: Path, tmp_path: Path) -> None:
    run = castling(
        "export", timm_file, "--weights", "state_dict", "--target", "onnx", "--no-benchmark", "-o", tmp_path, "--json"
    )
    assert run.code == 0, run.err
    assert run.document["checkpoint"]["told"]["weights"] == "state_dict"
    (artifact,) = run.document["artifacts"]
    again = castling("verify", artifact["path"], "--checkpoint", timm_file)
    assert again.code == 0, again.err
    seen = castling("inspect", timm_file, "--weights", "state_dict")
    assert seen.code == 0 and "asked for rather than 'state_dict_ema'" in " ".join(seen.err.split())
    refused = castling("inspect", artifact["path"], "--weights", "state_dict")
    assert refused.code == 2 and "--weights" in refused.err


def test_a_zero_dconv_leaves_its_warning_in_the_manifest(tmp_path: Path) -> None:
    torch.save(small("deit-softmax").state_dict(), tmp_path / "softmax.pth")
    run = castling(
        "export", tmp_path / "softmax.pth", "--init-dconv", "zero", "--target", "onnx", "--no-benchmark",
        "-o", tmp_path, "--json",
    )  # fmt: skip
    assert run.code in (0, 5), run.err
    (artifact,) = run.document["artifacts"]
    checkpoint = json.loads((Path(artifact["path"]) / "manifest.json").read_text())["checkpoint"]
    assert checkpoint["init_dconv"] == "zero" and "filled with zeros" in checkpoint["warnings"][0]
    assert "filled with zeros" in " ".join(run.err.split())


OTHER = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_threshold_and_normalisation_are_the_users_and_what_is_assumed_is_said(tmp_path: Path) -> None:
    torch.save(CURRENT, tmp_path / "c.pth")
    usual: Any = castling_deploy.load(tmp_path / "c.pth")
    assert usual.card.assumed == ("aux_threshold", "mean", "std") and usual.config.aux_threshold == 0.02
    mean, std = OTHER
    network: Any = castling_deploy.load(tmp_path / "c.pth", aux_threshold=0.3, mean=mean, std=std)
    assert network.card.assumed == () and (network.card.preprocessing.mean, network.card.preprocessing.std) == OTHER
    evidence = measure_cast(network, torch.randn(2, 3, 32, 32))
    assert {layer.evidence.threshold for layer in evidence} == {0.3}
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(network(x), usual(x)), "the reference in training form masks by another threshold"


def test_the_user_is_believed_rather_than_the_file(tmp_path: Path) -> None:
    castling_deploy.save(small("deit"), tmp_path / "c.safetensors", aux_threshold=0.1, mean=[0.5, 0.5, 0.5])
    stated: Any = castling_deploy.load(tmp_path / "c.safetensors", std=(0.2, 0.2, 0.2))
    assert stated.config.aux_threshold == 0.1 and stated.card.preprocessing.std == (0.2, 0.2, 0.2)
    told: Any = castling_deploy.load(tmp_path / "c.safetensors", aux_threshold=0.3)
    assert told.config.aux_threshold == 0.3 and told.card.preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_manifest_says_what_was_told_and_verify_takes_it_again(tmp_path: Path) -> None:
    torch.save(CURRENT, tmp_path / "c.pth")
    run = castling(
        "export", tmp_path / "c.pth", "--aux-threshold", "0.3", "--mean", "0.1,0.2,0.3",
        "--target", "onnx", "--no-benchmark", "-o", tmp_path, "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    (artifact,) = run.document["artifacts"]
    manifest = json.loads((Path(artifact["path"]) / "manifest.json").read_text())
    told = {"weights": None, "aux_threshold": 0.3, "mean": [0.1, 0.2, 0.3], "std": None}
    assert manifest["checkpoint"]["told"] == told and manifest["checkpoint"]["assumed"] == ["std"]
    assert manifest["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    again = castling("verify", artifact["path"], "--checkpoint", tmp_path / "c.pth", "--json")
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--aux-threshold", "2"], "auxiliary threshold of 2"),
        (["--std", "0.2,0,0.2"], "standard deviations of"),
        (["--mean", "nan"], "no number"),
        (["--mean", "red"], "'red' is not one number per channel"),
        (["--mean", "0.5"], "1 means and 3 standard deviations"),
        (["--model", "picodet", "--aux-threshold", "0.1"], "has no auxiliary branch"),
    ],
)
def test_what_cannot_be_true_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    network = dense("picodet") if "picodet" in options else small("deit")
    torch.save(network.state_dict(), tmp_path / "c.pth")
    size = ["--imgsz", "64,96"] if "picodet" in options else []
    run = castling("inspect", tmp_path / "c.pth", *options, *size)
    assert run.code == 2 and message in " ".join(run.err.split())
