"""castlify: timm's networks with Castling's attention train there, and are exported here as what they compute."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import conditioned
from safetensors.torch import save_file
from torch import nn

import castling_deploy
from castling_deploy.castle import castle
from castling_deploy.checkpoint import read
from castling_deploy.errors import FoldError, ShapeError, UsageError
from castling_deploy.identify import identify
from castling_deploy.models import castlify

Build = Callable[..., nn.Module]
# name in timm -> name of ours; all at an image size that makes them quick
PUBLISHED = {
    "deit_tiny_patch16_224": "castling-deit-tiny",
    "deit_tiny_distilled_patch16_224": "castling-deit-tiny-distilled",
    "vit_tiny_patch16_224": "castling-deit-tiny",
    "levit_128s": "castling-levit-128s",
    "levit_192": "castling-levit-192",
    "mvitv2_tiny": "castling-mvitv2-tiny",
}
SMALL = ("vit", "deit-distilled", "levit", "levit-distilled", "mvit")


@pytest.fixture
def create(timm: ModuleType) -> Build:
    """A published network of timm with fresh weights."""
    return partial(timm.create_model, pretrained=False)


@pytest.fixture
def small(timm: ModuleType) -> Build:
    """A small network of timm's classes with fresh weights, always the same."""
    vit = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    levit = {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 16, "depth": (1, 1, 1), "num_heads": (2, 3, 4)}
    mvit = {"embed_dim": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1)}
    models = timm.models
    builds: dict[str, Build] = {
        "vit": partial(models.vision_transformer.VisionTransformer, img_size=32, **vit),
        "deit-distilled": partial(models.deit.VisionTransformerDistilled, img_size=(32, 48), **vit),
        "levit": partial(models.levit.Levit, **levit),
        "levit-distilled": partial(models.levit.LevitDistilled, **levit),
    }

    def build(name: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        if name == "mvit":
            config = models.mvitv2.MultiScaleVitCfg(**mvit, **options)
            return models.mvitv2.MultiScaleVit(config, img_size=32, num_classes=10)
        return builds[name](num_classes=10, **options)

    return build


def images_for(model: Any, count: int = 2) -> torch.Tensor:
    """(count, 3, H, W) noise at the size that a castlified network says it takes."""
    return torch.randn(count, 3, *model.castling["image_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_is_kept_and_only_token_convolutions_are_new(small: Build, name: str) -> None:
    original = small(name)
    before = copy.deepcopy(original.state_dict())
    castled = castlify(original).state_dict()
    new = castled.keys() - before.keys()
    assert new and all(re.fullmatch(r"(stages\.\d\.)?blocks\.\d+\.attn\.dconv\.weight", key) for key in new)
    assert all(torch.equal(castled[key], value) for key, value in before.items())
    assert all(castled[key].shape[1:] == (1, 9, 1) and castled[key].std() > 0.05 for key in new)


@pytest.mark.parametrize("name", SMALL)
def test_the_original_is_left_as_it_was(small: Build, name: str) -> None:
    original = small(name).eval()
    castled = castlify(original)
    images = images_for(castled)
    expected = original(images)  # with gradients: LeViT caches biases that hang on a graph
    again = castlify(original)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.train()
    assert not any(module.training for module in original.modules())
    assert torch.equal(original(images), expected)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_saved_weights_are_recognised_and_compute_the_same(create: Build, tmp_path: Path, name: str) -> None:
    castled = conditioned(castlify(create(name, img_size=64)))
    torch.save(castled.state_dict(), tmp_path / "castled.pth")
    save_file(castled.state_dict(), tmp_path / "castled.safetensors")
    network, card = identify(read(tmp_path / "castled.pth"))
    assert card.name == PUBLISHED[name] and card.config.image_size == (64, 64)
    assert all(dropped.endswith("num_batches_tracked") for dropped in card.dropped)
    same, _ = identify(read(tmp_path / "castled.safetensors"))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in same.state_dict().items())
    images = images_for(castled)
    expected = castled(images)
    assert (network(images) - expected).abs().max() < 1e-6 * expected.abs().max()
    images, expected = images.double(), castled.double()(images.double())
    assert (network.double()(images) - expected).abs().max() < 1e-12 * expected.abs().max()
    cast = castle(castled)(images)
    assert (castle(network)(images) - cast).abs().max() < 1e-12 * cast.abs().max()
    assert (cast - expected).abs().max() > 1e-6 * expected.abs().max(), "the branch had no part in it"


@pytest.mark.parametrize("name", SMALL)
def test_it_learns(small: Build, name: str) -> None:
    castled = castlify(small(name)).train()
    optimizer = torch.optim.AdamW(castled.parameters(), lr=1e-3)
    images, labels = images_for(castled, 8), torch.arange(8)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(castled(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = [parameter for key, parameter in castled.named_parameters() if re.search(r"attn\.(dconv|qkv)", key)]
    assert trained
    for parameter in trained:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


def test_what_is_frozen_stays_frozen_and_modes_types_and_dropout_are_kept(small: Build) -> None:
    original = small("vit", proj_drop_rate=0.5)
    original.double().eval().requires_grad_(False)
    castled = castlify(original)
    assert {key for key, value in castled.named_parameters() if value.requires_grad} == {
        "blocks.0.attn.dconv.weight",
        "blocks.1.attn.dconv.weight",
    }
    assert {value.dtype for value in castled.parameters()} == {torch.float64}
    assert not any(module.training for module in castled.modules())
    attention = castled.get_submodule("blocks.0.attn")
    tokens = torch.ones(1, 5, 32, dtype=torch.float64)
    assert torch.equal(attention(tokens), attention(tokens))
    assert not torch.equal(attention.train()(tokens), attention(tokens))


@pytest.mark.parametrize("name", ["deit-distilled", "levit", "mvit"])
def test_it_is_exported_as_it_is_with_what_timm_says_of_its_images(small: Build, tmp_path: Path, name: str) -> None:
    original = small(name)
    original.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5), "interpolation": "bicubic"}
    castled = conditioned(castlify(original, aux_threshold=0.1, kernel=5))
    with pytest.raises(UsageError, match="training mode"):
        castling_deploy.export(castled.train(), target="onnx", output=tmp_path)
    result = castling_deploy.export(castled.eval(), target="onnx", output=tmp_path)
    images = images_for(castled)
    with castling_deploy.open(result.path) as model, torch.no_grad():
        artefact, expected = torch.from_numpy(model(images.numpy())), castle(castled)(images)
        preprocessing = model.folder.preprocessing
    assert (artefact - expected).abs().max() < 1e-4 * expected.abs().max()
    assert list(preprocessing.size) == castled.castling["image_size"]
    assert preprocessing.mean == (0.5, 0.5, 0.5) and preprocessing.std == (0.25, 0.5, 0.5)
    assert preprocessing.resize_kernel == "bicubic"


def test_it_says_what_its_tensors_do_not_tell(create: Build) -> None:
    castled = castlify(create("vit_tiny_patch16_224", depth=1), aux_threshold=0.1)
    assert castled.castling == {
        "image_size": [224, 224],
        "aux_threshold": 0.1,
        "mean": [0.5, 0.5, 0.5],  # of ViT, and not of DeiT
        "std": [0.5, 0.5, 0.5],
        "crop_fraction": 0.9,
        "resize_kernel": "bicubic",
    }


REFUSED = {
    "its pooling": ("vit", {"global_pool": "avg"}, "global_pool='avg'", "global_pool='token'"),
    "registers": ("vit", {"reg_tokens": 4}, "num_reg_tokens=4", "reg_tokens=0"),
    "positions of patches alone": ("vit", {"no_embed_class": True}, "no_embed_class=True", "no_embed_class=False"),
    "normalised queries": ("vit", {"qk_norm": True}, "'blocks.0.attn.q_norm.weight'", "norms"),
    "LayerScale": ("vit", {"init_values": 1e-5}, "'blocks.0.ls1.gamma'", "LayerScale"),
    "another attention": ("vit", {"attn_layer": "diff"}, "'blocks.0.attn' is a DiffAttention", "attn_layer"),
    "dropped attention": ("vit", {"attn_drop_rate": 0.1}, "'blocks.0.attn' drops", "attn_drop_rate=0"),
    "an activation": ("vit", {"act_layer": "relu"}, "'blocks.0.mlp.act' is a ReLU", "GELU"),
    "another GELU": ("vit", {"act_layer": partial(nn.GELU, "tanh")}, "'blocks.0.mlp.act' is a GELU", "GELU"),
    "an epsilon": ("vit", {"norm_layer": nn.LayerNorm}, "'blocks.0.norm1' is a LayerNorm of eps 1e-05", "usual"),
    "no depth": ("vit", {"depth": 0}, "has no blocks", "depth"),
    "LeViT's activation": ("levit", {"act_layer": "gelu"}, "'stem.act1' is a GELU", "Hardswish"),
    "LeViT of convolutions": ("levit", {"use_conv": True}, "use_conv=True", "levit_128s for levit_conv_128s"),
    "a class token": ("mvit", {"use_cls_token": True}, "global_pool='token'", "global_pool='avg'"),
    "no residual": ("mvit", {"residual_pooling": False}, "'stages.0.blocks.0.attn' does not add", "residual_pooling"),
    "other patches": ("mvit", {"patch_padding": (2, 2)}, "'patch_embed.proj' is a Conv2d of padding", "usual"),
    "pooling by maximum": ("mvit", {"mode": "max"}, "could not be exported", "families"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_could_not_be_exported_is_refused_by_name(small: Build, reason: str) -> None:
    name, options, message, hint = REFUSED[reason]
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        castlify(small(name, **options))
    assert hint in str(caught.value.hint)


def test_blocks_of_another_class_are_refused(small: Build, timm: ModuleType) -> None:
    with pytest.raises(UsageError, match=r"'blocks\.0' is a ParallelScalingBlock"):
        castlify(small("vit", block_fn=timm.models.vision_transformer.ParallelScalingBlock))


def test_networks_that_are_not_timms_or_of_no_family_or_castled_already_are_refused(
    small: Build, create: Build
) -> None:
    for network in (create("resnet10t"), create("beit_base_patch16_224", depth=1), nn.Sequential()):
        with pytest.raises(UsageError, match=f"cannot take a {type(network).__name__}") as caught:
            castlify(network)
        assert "VisionTransformer" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"'head\.weight'"):
        castlify(create("vit_tiny_patch16_224", depth=1, num_classes=0))
    with pytest.raises(UsageError, match="already"):
        castlify(castlify(small("vit")))


@pytest.mark.parametrize("options", [{"kernel": 8}, {"kernel": -1}, {"aux_threshold": 2}])
def test_impossible_options_are_refused(small: Build, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        castlify(small("vit"), **options)


def test_masks_other_sizes_and_folds_have_an_answer(small: Build) -> None:
    vit, mvit = castlify(small("vit")).eval(), castlify(small("mvit")).eval()
    with pytest.raises(UsageError, match="mask"):
        vit.get_submodule("blocks.0.attn")(torch.ones(1, 5, 32), attn_mask=torch.ones(5, 5))
    with pytest.raises(ShapeError, match="16 x 16 tokens in a network for 32 x 32 pixels"):
        mvit(torch.ones(1, 3, 64, 64))
    for network in (vit, mvit):
        with pytest.raises(FoldError, match="timm"):
            castling_deploy.fold(castling_deploy.castle(network))
