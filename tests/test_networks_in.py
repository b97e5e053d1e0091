"""A network is found among the other tensors of its training module; what is left out is named, doubt is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import dense, small
from torch import nn

import castling_deploy
from castling_deploy.checkpoint import read
from castling_deploy.errors import CheckpointError
from castling_deploy.identify import identify

Tensors = dict[str, torch.Tensor]
STRAY = {"criterion.weight": torch.ones(10), "step": torch.ones(1)}
REGNET = {"teacher.stem.conv.weight": torch.ones(2, 3, 3, 3), "teacher.head.fc.weight": torch.ones(10, 2)}


def under(prefix: str, network: nn.Module) -> Tensors:
    return {prefix + name: value for name, value in network.state_dict().items()}


def without(tensors: Tensors, ending: str) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith(ending)}


def identified(tensors: Tensors, folder: Path, **options: Any) -> Any:
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "last.ckpt")
    return identify(read(folder / "last.ckpt"), **options)


# What is saved, and the prefix under which the network is.
FOUND: dict[str, tuple[str, Tensors, str]] = {
    "Lightning with a weighted criterion": ("deit", {**under("model.", small("deit")), **STRAY}, "model."),
    "a teacher of another kind": ("levit", {**under("student.", small("levit")), **REGNET}, "student."),
    "a metric of no images and a diverged teacher": (
        "deit",
        {
            **under("student.", small("deit")),
            **{name: torch.full_like(value, float("nan")) for name, value in REGNET.items()},
            "accuracy.per_class": torch.full((10,), float("inf")),
        },
        "student.",
    ),
    "a softmax teacher": (
        "deit",
        {**under("student.", small("deit")), **under("teacher.", small("deit-softmax"))},
        "student.",
    ),
    "a prefix of two parts": ("deit", {**under("task.net.", small("deit")), **STRAY}, "task.net."),
    "a prefix that nobody knows": ("deit", under("my_vit.", small("deit")), "my_vit."),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_network_is_found_and_the_others_are_named(name: str, tmp_path: Path) -> None:
    network, tensors, prefix = FOUND[name]
    loaded, card = identified(tensors, tmp_path)
    x = torch.randn(2, 3, *loaded.config.image_size)
    assert torch.equal(loaded(x), small(network)(x))
    others = {key for key in tensors if not key.startswith(prefix)}
    assert others <= set(card.dropped) and card.loaded == len(tensors) - len(card.dropped)
    (taken,) = [entry for entry in card.peeled if entry.startswith(f"prefix '{prefix}'")]
    assert all(other in taken for other in list(others)[:1] if len(others) < 4)
    assert (f"without {len(others)} other tensors" in taken) == bool(others)


def test_a_detector_is_found_whole_and_not_its_backbone(tmp_path: Path) -> None:
    _, card = identified({**under("model.", dense("picodet")), **STRAY}, tmp_path)
    assert card.family == "picodet" and set(card.dropped) >= STRAY.keys()


def test_foreign_names_are_translated_under_a_prefix(tmp_path: Path) -> None:
    tensors = {}
    for name, value in small("deit").state_dict().items():
        parts = zip("qkv", value.chunk(3), strict=False) if ".attn.qkv." in name else [("qkv", value)]
        tensors |= {"net." + name.replace("qkv", part): rows for part, rows in parts}
    _, card = identified({**tensors, **STRAY}, tmp_path)
    assert "q, k and v stacked into qkv" in card.peeled


def test_a_teacher_whose_names_contradict_themselves_is_nobodys_trouble(tmp_path: Path) -> None:
    pvt = {"teacher.block1.0.attn.q.weight": torch.ones(4, 4), "teacher.block1.0.attn.kv.weight": torch.ones(8, 4)}
    loaded, _ = identified({**under("student.", small("deit")), **pvt}, tmp_path)
    assert torch.equal(loaded.get_parameter("norm.weight"), small("deit").get_parameter("norm.weight"))


@pytest.mark.parametrize(("first", "second"), [("student.", "teacher."), ("model.", "ema_model.")])
def test_two_networks_that_fit_are_refused_by_name(first: str, second: str, tmp_path: Path) -> None:
    tensors = {**under(first, small("deit")), **under(second, small("deit", 1))}
    with pytest.raises(CheckpointError, match=f"2 networks, under '{first}' and '{second}'") as caught:
        identified(tensors, tmp_path)
    assert caught.value.hint


def test_a_softmax_network_fits_where_it_is_asked_for(tmp_path: Path) -> None:
    tensors = {**under("a.", small("deit-softmax")), **under("b.", small("deit"))}
    assert identified(tensors, tmp_path)[1].config.attention == "castling"
    with pytest.raises(CheckpointError, match=r"2 networks, under 'a\.' and 'b\.'"):
        identified(tensors, tmp_path, model="deit")


NAN = {"norm.weight": torch.full((32,), float("nan"))}
REFUSED = {
    "a diverged network": (
        {**under("model.", small("deit")), **{f"model.{name}": value for name, value in NAN.items()}},
        "tensor 'model.norm.weight' in .* has 32 values that are NaN",
    ),
    "without its head": (without(under("model.", small("deit")), "head.weight"), r"no tensor 'head.weight'"),
    "almost a network": (without(under("model.", small("deit")), "pos_embed"), r"Castling-DeiT, also has pos_embed$"),
    "a softmax network": (under("model.", small("deit-softmax")), "softmax network with the names of Castling-DeiT"),
    "nothing known": ({"model.conv1.weight": torch.ones(1)}, r"tensors like these \(3 of them: model.conv1.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_the_familys_names(name: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        identified({**tensors, **STRAY}, tmp_path)
    assert re.search(message, caught.value.message)


class Holder(nn.Module):
    """Has a network, and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small("deit")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.model(x)  # type: ignore[no-any-return]


def test_a_module_that_holds_a_network_is_not_exported_as_that_network(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Castling network"):
        castling_deploy.export(Holder().eval(), target="onnx", output=tmp_path)
