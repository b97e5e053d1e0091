"""From tensors to a network: sizes are resized and never relabelled, baselines are named, nothing crashes on shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BASELINES, SMALL, small

from castling_deploy.checkpoint import Checkpoint
from castling_deploy.errors import CheckpointError, ShapeError, UsageError
from castling_deploy.identify import identify

REMOVED = None


def checkpoint(name: str, **changes: torch.Tensor | None) -> Checkpoint:
    tensors: dict[str, Any] = {
        key: value for key, value in small(name).state_dict().items() if not key.endswith("num_batches_tracked")
    }
    tensors.update({key.replace("__", "."): value for key, value in changes.items()})
    return Checkpoint(Path("x.pth"), None, {key: value for key, value in tensors.items() if value is not None})


def test_a_size_with_as_many_tokens_is_resized_too() -> None:
    """4 x 4 patches of 8 pixels; 16 x 64 pixels have as many, in another grid: the table has to be interpolated."""
    network, card = identify(checkpoint("deit"), image_size=(16, 64))
    native = checkpoint("deit").tensors["pos_embed"]
    assert card.config.image_size == (16, 64)
    assert not torch.allclose(network.get_parameter("pos_embed"), native, atol=1e-3)
    assert "resized to 16 x 64" in card.warnings[0] and "trained at 32 x 32" in card.warnings[0]


@pytest.mark.parametrize("name", ["levit", "mvit"])
def test_rectangles_are_reached_from_the_native_square(name: str) -> None:
    size = (32, 128) if name == "levit" else (32, 96)
    network, _ = identify(checkpoint(name), image_size=size)
    assert network(torch.randn(1, 3, *size)).shape == (1, 10)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_taken_only_where_it_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="softmax network") as caught:
        identify(checkpoint(name))
    assert "--model" in (caught.value.hint or "") and "--init-dconv zero" in (caught.value.hint or "")
    family = {"deit": "deit", "levit": "levit", "mvit": "mvitv2"}[name.partition("-")[0]]
    _, card = identify(checkpoint(name), model=family)
    assert card.name == family and card.config.attention == "softmax"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("last.pth.tar", "castling-deit-last"),
        ("model_best.pth.tar", "castling-deit-model-best"),
        ("a.b.pth", "castling-deit-a-b"),
        ("castling-mine.ckpt", "castling-mine"),
        (".tar", "castling-deit-tar"),
    ],
)
def test_a_file_gives_its_name_without_what_it_ends_with(file: str, name: str) -> None:
    assert identify(replace(checkpoint("deit"), path=Path(file)))[1].name == name


def test_a_zero_dconv_is_an_experiment_with_a_warning() -> None:
    _, card = identify(checkpoint("deit-softmax"), init_dconv="zero")
    assert card.init_dconv == "zero" and "filled with zeros" in card.warnings[0]
    with pytest.raises(UsageError, match="no attention without"):
        identify(checkpoint("deit"), init_dconv="zero")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deit", {"pos_embed": torch.tensor(1.0)}),
        ("deit", {"pos_embed": torch.zeros(1, 0, 32)}),
        ("deit", {"patch_embed__proj__weight": torch.zeros(3, 3)}),
        ("deit", {"blocks__0__attn__dconv__weight": torch.zeros(0, 1, 9, 1)}),
        ("deit", {"blocks__0__attn__dconv__weight": torch.zeros(9)}),
        ("deit", {"head__weight": torch.tensor(1.0)}),
        ("deit", {"head__weight": torch.zeros(0, 32), "head__bias": torch.zeros(0)}),
        ("levit", {"stages__0__blocks__0__attn__attention_biases": torch.zeros(4)}),
        ("levit", {"stages__0__blocks__0__attn__attention_biases": REMOVED}),
        ("levit", {"stages__0__blocks__0__attn__qkv__linear__weight": torch.zeros(0, 32)}),
    ],
)
def test_impossible_shapes_are_a_clear_error(name: str, changes: dict[str, torch.Tensor | None]) -> None:
    with pytest.raises((CheckpointError, ShapeError)) as caught:
        identify(checkpoint(name, **changes))
    assert caught.value.hint


@pytest.mark.parametrize("name", SMALL)
def test_every_small_network_is_identified_as_its_family(name: str) -> None:
    _, card = identify(checkpoint(name), image_size=small(name).config.image_size)  # type: ignore[arg-type, union-attr]
    assert card.family.startswith(f"castling-{name.partition('-')[0]}")
    assert card.warnings == ()
