"""Files that timm writes, and facebook's files as timm reads them: the network that is loaded holds timm's tensors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import conditioned
from test_foreign_names import DEPTHS, facebook_levit
from torch import nn

from castling_deploy.checkpoint import read
from castling_deploy.identify import identify
from castling_deploy.models import castlify
from castling_deploy.models.layers import ConvNorm, LinearNorm, NormLinear

Tensors = dict[str, torch.Tensor]


def weights(network: nn.Module) -> Tensors:
    return {name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name}


def assert_same(loaded: nn.Module, theirs: nn.Module) -> None:
    """The same tensors, bit for bit, and what timm computes from them."""
    ours, expected = weights(loaded), weights(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = theirs.eval()(images)
        assert (loaded(images) - outputs).abs().max() < 1e-5 * outputs.abs().max()


def facebook_levit_names(depths: tuple[int, ...]) -> Iterator[str]:
    """In the order of facebookresearch/LeViT levit.py, which is also the order of timm's: its converter of facebook's
    files relied on that."""

    def unit(place: str, inner: str = "c") -> Iterator[str]:
        bn = [f"{place}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
        matrix = f"{place}.{inner}.weight"
        yield from [matrix, *bn] if inner == "c" else [*bn, matrix, f"{place}.{inner}.bias"]

    for convolution in (0, 2, 4, 6):
        yield from unit(f"patch_embed.{convolution}")
    number = 0
    for stage, depth in enumerate(depths):
        if stage > 0:
            yield f"blocks.{number}.attention_biases"
            for part in ("kv", "q.1", "proj.1"):
                yield from unit(f"blocks.{number}.{part}")
            for part in ("m.0", "m.2"):
                yield from unit(f"blocks.{number + 1}.{part}")
            number += 2
        for _ in range(depth):
            yield f"blocks.{number}.m.attention_biases"
            for part in ("m.qkv", "m.proj.1"):
                yield from unit(f"blocks.{number}.{part}")
            for part in ("m.0", "m.2"):
                yield from unit(f"blocks.{number + 1}.{part}")
            number += 2
    yield from unit("head", "l")
    yield from unit("head_dist", "l")


@pytest.mark.parametrize(("name", "depths"), [("levit_128s", (2, 3, 4)), ("levit_192", (4, 4, 4))])
def test_facebooks_levit_is_timms(timm: ModuleType, name: str, depths: tuple[int, ...], tmp_path: Path) -> None:
    theirs = conditioned(timm.create_model(name, pretrained=False))
    names = facebook_levit_names(depths)
    tensors = dict(zip(names, theirs.state_dict().values(), strict=True))
    indices = {"blocks.0.m.attention_bias_idxs": torch.zeros(196, 196, dtype=torch.long)}  # facebook saves them
    torch.save({"model": {**tensors, **indices}}, tmp_path / "LeViT.pth")
    loaded, card = identify(read(tmp_path / "LeViT.pth"), model="levit")
    assert card.name == name.replace("_", "-")
    assert card.peeled == ("container 'model'", "names of facebook LeViT")
    assert_same(loaded, theirs)


def test_facebooks_mvitv2_is_what_timms_own_converter_makes_of_it(timm: ModuleType, tmp_path: Path) -> None:
    theirs = conditioned(timm.create_model("mvitv2_tiny", pretrained=False))
    firsts = list(accumulate(theirs.depths, initial=0))  # type: ignore[arg-type]

    def flat(found: re.Match[str]) -> str:
        return f"blocks.{firsts[int(found[1])] + int(found[2])}."

    renamed = {re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", flat, name): value for name, value in weights(theirs).items()}
    facebook = {
        name.replace("shortcut_proj_attn", "proj").replace("head.fc", "head.projection"): value
        for name, value in renamed.items()
    }
    assert {"blocks.1.proj.weight", "blocks.9.mlp.fc2.bias", "head.projection.weight"} <= facebook.keys()
    content = {"epoch": 1, "model_state": facebook, "optimizer_state": {}, "cfg": "yaml"}
    converted = timm.models.mvitv2.checkpoint_filter_fn(content, theirs)
    torch.save(content, tmp_path / "MViTv2_T.pyth")
    loaded, card = identify(read(tmp_path / "MViTv2_T.pyth"), model="mvitv2")
    assert card.name == "mvitv2-tiny" and card.peeled == ("container 'model_state'", "names of facebook MViT")
    assert weights(loaded).keys() == converted.keys()
    assert all(torch.equal(value, converted[name]) for name, value in weights(loaded).items())
    assert_same(loaded, theirs)


CASTLIFIED = ("deit_tiny_patch16_224", "levit_128s", "mvitv2_tiny")


@pytest.fixture
def castled(timm: ModuleType) -> Callable[[str], Any]:
    return lambda name: conditioned(castlify(timm.create_model(name, pretrained=False)))


@pytest.mark.parametrize("name", CASTLIFIED)
def test_timms_trainer_saves_an_average_which_is_preferred_and_reported(
    timm: ModuleType, castled: Callable[[str], Any], name: str, tmp_path: Path
) -> None:
    network = castled(name)
    average = timm.utils.ModelEmaV3(network, decay=0.5)
    for parameter in network.parameters():
        parameter.add_(0.01)
    average.update(network)
    saver = timm.utils.CheckpointSaver(
        network,
        torch.optim.AdamW(network.parameters()),
        args=argparse.Namespace(model=name, lr=1e-3, output=tmp_path),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, 71.5)
    loaded, card = identify(read(tmp_path / "last.pth.tar"))
    assert card.peeled == ("container 'state_dict_ema', preferred to 'state_dict'",)
    assert_same(loaded, average.module)
    assert any(not torch.equal(value, weights(network)[name]) for name, value in weights(loaded).items())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", CASTLIFIED)
def test_a_folder_for_the_hub_is_read_with_what_it_says(
    timm: ModuleType, castled: Callable[[str], Any], name: str, safe: bool, tmp_path: Path
) -> None:
    network = castled(name)
    timm.models._hub.save_for_hf(network, tmp_path, safe_serialization=safe)
    loaded, card = identify(read(tmp_path))
    assert_same(loaded, network)
    usual = network.pretrained_cfg
    assert (card.preprocessing.mean, card.preprocessing.std) == (usual["mean"], usual["std"])
    assert card.preprocessing.crop_fraction == usual["crop_pct"]


def fuse(network: nn.Module) -> None:
    """As replace_batchnorm of facebookresearch/LeViT utils.py: in place, whatever knows how."""
    for name, child in network.named_children():
        if hasattr(child, "fuse"):
            setattr(network, name, child.fuse())
        else:
            fuse(child)


@pytest.mark.parametrize("named", [dict, facebook_levit])
def test_a_levit_that_was_fused_before_it_was_saved_is_what_it_was(
    timm: ModuleType, named: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    levit = {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 16, "num_heads": (2, 3, 4), "depth": DEPTHS}
    network = conditioned(timm.models.levit.LevitDistilled(num_classes=10, **levit))
    images = torch.randn(2, 3, 64, 64)
    expected = network(images)
    fuse(network)
    fused = network.state_dict()
    assert not any("running" in name for name in fused)
    torch.save(named(fused), tmp_path / "fused.pth")
    loaded, card = identify(read(tmp_path / "fused.pth"), model="levit")
    assert card.peeled[0] == "BatchNorms, folded already, as ones that do nothing"
    assert (loaded(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, module in loaded.named_modules():
        if isinstance(module, (ConvNorm, LinearNorm, NormLinear)):
            for part, value in module.folded().named_parameters():
                assert torch.equal(value, fused[f"{name}.{part}"]), "folded again, it is what was saved"
