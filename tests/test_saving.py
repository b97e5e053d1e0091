"""save and load are each other's inverse: every tensor, and everything that no tensor tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import BASELINES, DENSE, SMALL, conditioned, dense, small
from safetensors import safe_open

import castling_deploy
from castling_deploy import bundled
from castling_deploy.errors import CheckpointError, UsageError
from castling_deploy.models import castlify
from castling_deploy.models.family import family_named


def same_tensors(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    names = {name for name in one if "num_batches_tracked" not in name}
    return names <= other.keys() and all(torch.equal(one[name], other[name]) for name in names)


def metadata(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["castling"])


@pytest.mark.parametrize("name", [*SMALL, *BASELINES])
def test_every_classifier_comes_back(name: str, tmp_path: Path) -> None:
    config = replace({**SMALL, **BASELINES}[name][1], aux_threshold=0.1)  # type: ignore[type-var]
    build = {**SMALL, **BASELINES}[name][0]
    network = conditioned(build(config))  # type: ignore[arg-type]
    castling_deploy.save(network, tmp_path / "c.safetensors")
    baseline = {"deit": "deit", "levit": "levit", "mvit": "mvitv2"}[name.partition("-")[0]]
    loaded: Any = castling_deploy.load(tmp_path / "c.safetensors", model=baseline if name in BASELINES else None)
    x = torch.randn(2, 3, *config.image_size)
    assert loaded.config == config and torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("name", DENSE)
def test_every_detector_and_segmenter_comes_back(name: str, tmp_path: Path) -> None:
    """Of 64 x 96 pixels, which tensors do not tell: the network that was built knows what it was built for."""
    network = dense(name)
    castling_deploy.save(network, tmp_path / "c.safetensors")
    loaded: Any = castling_deploy.load(tmp_path / "c.safetensors")
    family, config = DENSE[name]
    assert (loaded.card.family, loaded.card.config, loaded.card.task) == (family, config, family_named(family).task)
    assert same_tensors(network, loaded)


@pytest.mark.parametrize("name", bundled.CHECKPOINTS)
def test_what_is_bundled_is_what_save_writes(name: str, tmp_path: Path) -> None:
    castling_deploy.save(castling_deploy.load(model=name), tmp_path / "c.safetensors")
    assert metadata(tmp_path / "c.safetensors") == metadata(bundled.checkpoint_path(name))


def test_a_castlified_network_comes_back_with_what_timm_says_of_its_images(timm: ModuleType, tmp_path: Path) -> None:
    network = castlify(timm.create_model("vit_tiny_patch16_224", depth=1), aux_threshold=0.1)
    castling_deploy.save(network, tmp_path / "c.safetensors", labels=[str(number) for number in range(1000)])
    loaded: Any = castling_deploy.load(tmp_path / "c.safetensors")
    assert same_tensors(network, loaded) and loaded.config.aux_threshold == 0.1
    assert loaded.card.preprocessing.mean == (0.5, 0.5, 0.5) and loaded.card.preprocessing.crop_fraction == 0.9
    assert loaded.card.labels[999] == "999"


def test_nothing_is_overwritten_unasked_and_nothing_is_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    castling_deploy.save(small("deit"), path)
    with pytest.raises(UsageError, match="exists already") as caught:
        castling_deploy.save(small("deit", 1), path)
    assert "overwrite" in str(caught.value.hint)
    assert same_tensors(castling_deploy.load(path), small("deit"))
    castling_deploy.save(small("deit", 1), path, overwrite=True)
    assert same_tensors(castling_deploy.load(path), small("deit", 1))
    assert list(tmp_path.iterdir()) == [path]


def test_warnings_travel_until_the_network_is_trained(tmp_path: Path) -> None:
    castling_deploy.save(small("deit-softmax"), tmp_path / "softmax.safetensors")
    network: Any = castling_deploy.load(tmp_path / "softmax.safetensors", init_dconv="zero")
    castling_deploy.save(network, tmp_path / "zero.safetensors")
    again: Any = castling_deploy.load(tmp_path / "zero.safetensors")
    assert again.card.warnings == network.card.warnings and "filled with zeros" in again.card.warnings[0]
    network.blocks[0].attn.dconv.weight.add_(0.1)
    castling_deploy.save(network, tmp_path / "trained.safetensors")
    assert castling_deploy.load(tmp_path / "trained.safetensors").card.warnings == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*SMALL, "castlified"])
def test_what_was_built_and_cast_is_no_checkpoint(name: str, timm: ModuleType, tmp_path: Path) -> None:
    """DeiT's tensors are the same before and after: read back, they would be another network."""
    built = castlify(timm.create_model("vit_tiny_patch16_224", depth=1)) if name == "castlified" else small(name)
    with pytest.raises(UsageError, match="was cast"):
        castling_deploy.save(castling_deploy.castle(built), tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_the_cast_cost_is_not_told_of_a_network_that_was_built_and_cast(tmp_path: Path) -> None:
    def cast_rung(network: torch.nn.Module, name: str) -> Any:
        made = castling_deploy.export(network.eval(), target="onnx", output=tmp_path / name)
        assert made.parity is not None
        return made.parity.rungs[0]

    assert cast_rung(small("deit"), "trained").rel > 0
    assert cast_rung(castling_deploy.castle(small("deit")), "cast").rel is None


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    castling_deploy.save(small("levit"), tmp_path / "c.safetensors")
    castled = castling_deploy.castle(castling_deploy.load(tmp_path / "c.safetensors"))
    path = tmp_path / "other.safetensors"
    with pytest.raises(UsageError, match="was cast"):
        castling_deploy.save(castled, path)
    with pytest.raises(UsageError, match="was cast"):
        castling_deploy.save(castling_deploy.fold(castled), path)
    with pytest.raises(CheckpointError, match="no Castling network"):
        castling_deploy.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UsageError, match="'lables'"):
        castling_deploy.save(small("deit"), path, lables=["a"])
    with pytest.raises(CheckpointError, match="'std'"):
        castling_deploy.save(small("deit"), path, std=[0, 0, 0])
    with pytest.raises(UsageError, match="no name of a safetensors file"):
        castling_deploy.save(small("deit"), tmp_path / "c.pth")
    with pytest.raises(UsageError, match="cannot write"):
        castling_deploy.save(small("deit"), tmp_path / "nowhere" / "c.safetensors")
    assert not path.exists()
