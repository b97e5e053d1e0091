"""Whatever the names in the file, the network computes what it did where it was trained, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from networks import SMALL_DEIT, SMALL_DISTILLED, SMALL_LEVIT, conditioned, dense
from torch import nn

from castling_deploy.checkpoint import read
from castling_deploy.errors import CheckpointError, UsageError
from castling_deploy.identify import identify
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.dialects import in_our_names
from castling_deploy.models.levit import CastlingLeViT
from castling_deploy.models.zero_dconv import with_zero_dconv

Tensors = dict[str, torch.Tensor]
DEPTHS = (2, 1, 3)
DEIT = CastlingDeiT(SMALL_DEIT)
DISTILLED = CastlingDeiT(SMALL_DISTILLED)
LEVIT = CastlingLeViT(replace(SMALL_LEVIT, depths=DEPTHS))


def unstacked(ours: Tensors, letters: str = "q k v") -> Tensors:
    """qkv of every attention as three Linears."""
    found: Tensors = {}
    for name, value in ours.items():
        if ".attn.qkv." in name:
            names = [name.replace(".qkv.", f".{letter}.") for letter in letters.split()]
            found |= zip(names, value.chunk(3))  # type: ignore[arg-type]
        else:
            found[name] = value
    return found


def substituted(ours: Tensors, *rules: tuple[str, str]) -> Tensors:
    found = {}
    for name, value in ours.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def facebook_levit(ours: Tensors) -> Tensors:
    firsts = list(accumulate((2 * depth + 2 for depth in DEPTHS), initial=0))  # of each stage's residual layers

    def place(found: re.Match[str]) -> str:
        stage, rest = int(found[1]), found[2]
        if rest.startswith("downsample."):
            inside = rest.removeprefix("downsample.")
            return f"blocks.{firsts[stage] - (1 if inside.startswith('mlp') else 2)}.{inside}"
        _, block, inside = rest.split(".", 2)
        return f"blocks.{firsts[stage] + 2 * int(block) + inside.startswith('mlp')}.{inside}"

    named = {re.sub(r"^stages\.(\d)\.(.*)", place, name): value for name, value in ours.items()}
    return substituted(
        named,
        (r"^stem\.conv(\d)\.", lambda found: f"patch_embed.{2 * int(found[1]) - 2}."),  # type: ignore[arg-type]
        (r"\.attn_downsample\.q\.ln\.", ".q.1."),
        (r"\.attn_downsample\.proj\.ln\.", ".proj.1."),
        (r"\.attn_downsample\.", "."),
        (r"\.attn\.proj\.ln\.", ".m.proj.1."),
        (r"\.attn\.", ".m."),
        (r"\.mlp\.ln1\.", ".m.0."),
        (r"\.mlp\.ln2\.", ".m.2."),
        (r"^(head\w*)\.linear\.", r"\1.l."),
        (r"\.linear\.", ".c."),
    )


def with_pointwise(tensors: Tensors) -> Tensors:
    """Matrices of the residual layers as 1x1 convolutions."""
    return {
        name: value[..., None, None] if re.match(r"(blocks|stages)\..*(linear|c)\.weight$", name) else value
        for name, value in tensors.items()
    }


def transformers_levit(ours: Tensors) -> Tensors:
    def place(found: re.Match[str]) -> str:
        stage, rest = int(found[1]), found[2]
        if rest.startswith("downsample."):
            layer, inside = 2 * DEPTHS[stage - 1], rest.removeprefix("downsample.")
            where = f"levit.encoder.stages.{stage - 1}.layers."
            return f"{where}{layer + 1}.module.{inside}" if inside.startswith("mlp") else f"{where}{layer}.{inside}"
        _, block, inside = rest.split(".", 2)
        return f"levit.encoder.stages.{stage}.layers.{2 * int(block) + inside.startswith('mlp')}.module.{inside}"

    named = {re.sub(r"^stages\.(\d)\.(.*)", place, name): value for name, value in ours.items()}
    return substituted(
        named,
        (r"^stem\.conv(\d)\.linear\.", r"levit.patch_embeddings.embedding_layer_\1.convolution."),
        (r"^stem\.conv(\d)\.bn\.", r"levit.patch_embeddings.embedding_layer_\1.batch_norm."),
        (r"\.attn_downsample\.q\.ln\.", ".queries."),
        (r"\.attn_downsample\.kv\.", ".keys_values."),
        (r"\.attn_downsample\.proj\.ln\.", ".projection."),
        (r"\.attn_downsample\.", "."),
        (r"\.attn\.qkv\.", ".queries_keys_values."),
        (r"\.attn\.proj\.ln\.", ".projection."),
        (r"\.attn\.", "."),
        (r"\.mlp\.ln1\.", ".linear_up."),
        (r"\.mlp\.ln2\.", ".linear_down."),
        (r"\.bn\.", ".batch_norm."),
        (r"^head_dist\.", "classifier_distill."),
        (r"^head\.", "classifier."),
    )


def transformers_deit(ours: Tensors, model: str = "deit") -> Tensors:
    """As transformers 5.x names them in memory."""
    return substituted(
        unstacked(ours, "q_proj k_proj v_proj"),
        (r"^cls_token", f"{model}.embeddings.cls_token"),
        (r"^dist_token", f"{model}.embeddings.distillation_token"),
        (r"^pos_embed", f"{model}.embeddings.position_embeddings"),
        (r"^patch_embed\.proj", f"{model}.embeddings.patch_embeddings.projection"),
        (r"^blocks\.(\d+)\.norm1", rf"{model}.layers.\1.layernorm_before"),
        (r"^blocks\.(\d+)\.norm2", rf"{model}.layers.\1.layernorm_after"),
        (r"^blocks\.(\d+)\.attn\.proj", rf"{model}.layers.\1.attention.o_proj"),
        (r"^blocks\.(\d+)\.attn\.", rf"{model}.layers.\1.attention."),
        (r"^blocks\.(\d+)\.mlp\.", rf"{model}.layers.\1.mlp."),
        (r"^norm\.", f"{model}.layernorm."),
        (r"^head\.", "cls_classifier." if model == "deit" else "classifier."),
        (r"^head_dist\.", "distillation_classifier."),
    )


def transformers_deit_on_disk(ours: Tensors, model: str = "deit") -> Tensors:
    """As transformers 4.x names them, and 5.x still writes them."""
    return substituted(
        transformers_deit(ours, model),
        (r"\.layers\.", ".encoder.layer."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.dconv\.", ".attention.attention.dconv."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )


def paddle_picodet(ours: Tensors) -> Tensors:
    """As ppdet's ESNet, CSPPAN and PicoHead name their sublayers."""
    return substituted(
        ours,
        (r"running_mean$", "_mean"),
        (r"running_var$", "_variance"),
        (r"^(backbone.*)\.se\.conv(\d)\.conv\.", r"\1._se.conv\2."),
        (r"^(backbone.*)\.bn\.", r"\1._batch_norm."),
        (r"^(backbone.*)\.(conv\w*)\.conv\.", r"\1._\2._conv."),
        (r"^(backbone.*)\.(conv\w*)\._batch_norm\.", r"\1._\2._batch_norm."),
        (r"^neck\.trans\.trans\.", "neck.conv_t.convs."),
        (r"^(neck.*)\.depthwise_conv\.conv\.", r"\1.dwconv."),
        (r"^(neck.*)\.depthwise_conv\.bn\.", r"\1.bn1."),
        (r"^(neck.*)\.pointwise_conv\.conv\.", r"\1.pwconv."),
        (r"^(neck.*)\.pointwise_conv\.bn\.", r"\1.bn2."),
        (r"^bbox_head\.cls_convs\.(\d)\.(\d)\.depthwise_conv\.", r"head.conv_feat.cls_conv_dw\1.\2."),
        (r"^bbox_head\.cls_convs\.(\d)\.(\d)\.pointwise_conv\.", r"head.conv_feat.cls_conv_pw\1.\2."),
        (r"^(head\.conv_feat.*)\.bn\.", r"\1.norm."),
        (r"^bbox_head\.gfl_cls\.(\d)\.", r"head.head_cls\1."),
        (r"^bbox_head\.integral\.", "head.distribution_project."),
    )


STACKED = "q, k and v stacked into qkv"
MATRICES = "1x1 convolutions of LeViT as matrices"
FOREIGN: dict[str, tuple[nn.Module, Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "ours": (LEVIT, dict, ()),
    "facebook and timm DeiT": (DISTILLED, dict, ()),
    "facebook LeViT": (LEVIT, facebook_levit, ("names of facebook LeViT",)),
    "facebook levit_c": (
        LEVIT,
        lambda ours: with_pointwise(facebook_levit(ours)),
        ("names of facebook LeViT", MATRICES),
    ),
    "timm levit_conv": (LEVIT, with_pointwise, (MATRICES,)),
    "transformers LeViT": (LEVIT, transformers_levit, ("prefix 'module.'", "names of transformers LeViT")),
    "transformers DeiT": (DISTILLED, transformers_deit, ("names of transformers DeiT", STACKED)),
    "transformers DeiT on disk": (DISTILLED, transformers_deit_on_disk, ("names of transformers DeiT", STACKED)),
    "transformers ViT": (
        DEIT,
        lambda ours: transformers_deit_on_disk(ours, "vit"),
        ("names of transformers ViT", STACKED),
    ),
    "separate q, k, v": (DEIT, unstacked, (STACKED,)),
    "separate to_q, to_k, to_v": (DEIT, lambda ours: unstacked(ours, "to_q to_k to_v"), (STACKED,)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_network_under_foreign_names_computes_what_it_did(name: str, tmp_path: Path) -> None:
    network, foreign, peeled = FOREIGN[name]
    network = conditioned(network)
    height, width = network.config.image_size  # type: ignore[union-attr, misc]
    torch.save(foreign(network.state_dict()), tmp_path / "c.pth")
    loaded, card = identify(read(tmp_path / "c.pth"), image_size=(height, width))
    x = torch.randn(2, 3, height, width)
    assert torch.equal(loaded(x), network(x))
    assert card.peeled == peeled


def test_transformers_deit_of_one_head_computes_that_heads_logits(tmp_path: Path) -> None:
    """DeiTForImageClassification has a distillation token, which the other tokens see, and reads the class token."""
    network = conditioned(CastlingDeiT(SMALL_DISTILLED))
    names = substituted(transformers_deit_on_disk(network.state_dict()), (r"^cls_classifier\.", "classifier."))
    torch.save({name: names[name] for name in names if "distillation_classifier" not in name}, tmp_path / "c.pth")
    loaded, card = identify(read(tmp_path / "c.pth"), image_size=SMALL_DISTILLED.image_size)
    logits: list[torch.Tensor] = []
    network.get_submodule("head").register_forward_hook(lambda module, inputs, output: logits.append(output))
    x = torch.randn(2, 3, *SMALL_DISTILLED.image_size)
    network(x)
    assert torch.equal(loaded(x), logits[0])
    assert card.peeled[0] == "its only head doubled, beside one of zeros"


def test_facebooks_levit_is_numbered_as_published() -> None:
    """Depths (2, 1, 3): four residual layers, then downsampling 4 and its Mlp 5, and so on."""
    names = facebook_levit(LEVIT.state_dict())
    assert {"patch_embed.6.c.weight", "blocks.0.m.qkv.c.weight", "blocks.4.kv.c.weight", "blocks.5.m.0.c.weight",
            "blocks.8.q.1.bn.bias", "blocks.15.m.2.c.weight", "head_dist.l.bias"} <= names.keys()  # fmt: skip
    ours, _ = in_our_names({"patch_embed.0.c.weight": torch.ones(1), **names})
    assert ours.keys() == LEVIT.state_dict().keys()


def test_transformers_levit_is_read_with_its_module_components_too() -> None:
    names = transformers_levit(LEVIT.state_dict())
    assert "levit.encoder.stages.0.layers.0.module.queries_keys_values.linear.weight" in names
    assert in_our_names(names)[0].keys() == LEVIT.state_dict().keys()


def test_paddles_picodet_is_ours_by_other_names(tmp_path: Path) -> None:
    network = dense("picodet")
    names = paddle_picodet({name: value for name, value in network.state_dict().items() if "num_batches" not in name})
    assert {
        "backbone._conv1._conv.weight", "backbone._conv1._batch_norm._mean", "backbone.2_1._conv_dw_1._conv.weight",
        "backbone.2_2._se.conv1.bias", "backbone.4_1._conv_pw_mv1._batch_norm._variance", "neck.conv_t.convs.0.bn.bias",
        "neck.first_top_conv.dwconv.weight", "neck.top_down_blocks.1.blocks.0.conv2.bn2._mean",
        "neck.bottom_up_blocks.0.short_conv.conv.weight", "head.conv_feat.cls_conv_dw3.0.conv.weight",
        "head.conv_feat.cls_conv_pw0.0.norm.bias", "head.head_cls3.bias", "head.distribution_project.project",
    } <= names.keys()  # fmt: skip
    scale = {"head.p3_feat.scale_reg": torch.ones(1)}  # of a class that PicoHead is derived from
    torch.save({**names, **scale}, tmp_path / "picodet.pth")
    loaded, card = identify(read(tmp_path / "picodet.pth"), image_size=(64, 96))
    assert card.peeled == ("names of Paddle's PicoDet",) and card.dropped == ("head.p3_feat.scale_reg",)
    x = torch.randn(1, 3, 64, 96)
    assert all(torch.equal(*pair) for pair in zip(loaded(x), network(x), strict=True))


MVIT = {  # facebook's name and shape -> ours; the second and the fourth block begin a stage
    "patch_embed.proj.weight": ((96, 3, 1, 7, 7), "patch_embed.proj.weight", (96, 3, 7, 7)),
    "blocks.0.attn.pool_q.weight": ((96, 1, 1, 3, 3), "stages.0.blocks.0.attn.pool_q.weight", (96, 1, 3, 3)),
    "blocks.0.attn.proj.weight": ((96, 96), "stages.0.blocks.0.attn.proj.weight", (96, 96)),
    "blocks.1.proj.weight": ((192, 96), "stages.1.blocks.0.shortcut_proj_attn.weight", (192, 96)),
    "blocks.1.attn.qkv.weight": ((576, 96), "stages.1.blocks.0.attn.qkv.weight", (576, 96)),
    "blocks.1.attn.rel_pos_h": ((55, 96), "stages.1.blocks.0.attn.rel_pos_h", (55, 96)),
    "blocks.2.norm1.weight": ((192,), "stages.1.blocks.1.norm1.weight", (192,)),
    "blocks.3.proj.weight": ((384, 192), "stages.2.blocks.0.shortcut_proj_attn.weight", (384, 192)),
    "blocks.3.mlp.fc1.weight": ((1536, 384), "stages.2.blocks.0.mlp.fc1.weight", (1536, 384)),
    "norm.weight": ((384,), "norm.weight", (384,)),
    "head.projection.weight": ((10, 384), "head.fc.weight", (10, 384)),
}


def test_facebooks_mvit_falls_into_stages_and_loses_the_time_axis() -> None:
    ours, translated = in_our_names({name: torch.zeros(shape) for name, (shape, _, _) in MVIT.items()})
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: shape for _, name, shape in MVIT.values()
    }
    assert translated == ("names of facebook MViT",)
    assert in_our_names(ours) == (ours, ())


def without(tensors: Tensors, ending: str) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith(ending)}


REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "ShiftAdd": (
        lambda: substituted(DEIT.state_dict(), (r"attn\.qkv", "attn.to_qk")),
        r"'blocks.0.attn.to_qk.weight' belongs to ShiftAdd",
    ),
    "queries without keys": (
        lambda: without(unstacked(DEIT.state_dict()), "0.attn.k.weight"),
        r"'blocks.0.attn.q.weight' but no 'blocks.0.attn.k.weight'",
    ),
    "queries beside stacked ones": (
        lambda: {**DEIT.state_dict(), **unstacked(DEIT.state_dict())},
        r"both 'blocks.0.attn.q.weight' and 'blocks.0.attn.qkv.weight'",
    ),
    "two networks in one": (
        lambda: {**facebook_levit(LEVIT.state_dict()), "stem.conv1.linear.weight": torch.ones(1)},
        "'stem.conv1.linear.weight' twice",
    ),
    "a softmax DeiT": (
        lambda: without(DEIT.state_dict(), "dconv.weight"),
        "softmax network .* Castling-DeiT: it has no",
    ),
    "a softmax LeViT of facebook": (
        lambda: without(facebook_levit(LEVIT.state_dict()), "dconv.weight"),
        "softmax network with the names of Castling-LeViT",
    ),
    "almost a DeiT": (
        lambda: without(DEIT.state_dict(), "pos_embed"),
        "the closest, Castling-DeiT, also has pos_embed",
    ),
    "a convolutional network": (
        lambda: {"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(1)},
        r"no Castling network has tensors like these \(2 of them: conv1.weight, layer1.0.conv1.weight, ...\)$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_castling_network_is_refused_with_what_is_missing(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    torch.save(make(), tmp_path / "c.pth")
    with pytest.raises(CheckpointError) as caught:
        identify(read(tmp_path / "c.pth"))
    assert re.search(message, caught.value.message) and caught.value.hint


@pytest.mark.parametrize("foreign", [dict, facebook_levit, transformers_levit])
def test_zero_dconv_takes_a_softmax_network_with_a_warning(
    foreign: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    torch.save(foreign(without(conditioned(LEVIT).state_dict(), "dconv.weight")), tmp_path / "c.pth")
    network, card = identify(read(tmp_path / "c.pth"), init_dconv="zero")
    attention = network.get_submodule("stages.2.blocks.1.attn")
    assert attention.dconv.weight.shape == (4, 1, 9, 1) and not attention.dconv.weight.any()  # type: ignore[union-attr]
    assert card.warnings == (f"{sum(DEPTHS)} token convolutions (dconv) were filled with zeros: a softmax network, "
                             "never trained like this",)  # fmt: skip


def test_zero_dconv_is_refused_where_nothing_is_missing(tmp_path: Path) -> None:
    torch.save(DEIT.state_dict(), tmp_path / "c.pth")
    assert identify(read(tmp_path / "c.pth"))[1].warnings == ()
    with pytest.raises(UsageError, match="no attention without a token convolution"):
        identify(read(tmp_path / "c.pth"), init_dconv="zero")


@pytest.mark.parametrize(
    ("beside", "rows", "given", "heads"),
    [
        ({}, 3 * 192, None, 3),
        ({}, 3 * 192, 8, 8),
        ({"attn.pool_q.weight": (96, 1, 3, 3)}, 3 * 384, None, 4),
        ({"attn.attention_biases": (6, 49)}, 384, None, 6),
    ],
)
def test_heads_of_a_zero_dconv_are_those_of_the_published_networks(
    beside: dict[str, tuple[int, ...]], rows: int, given: int | None, heads: int
) -> None:
    tensors = {"attn.qkv.weight": torch.ones(rows, 8), **{name: torch.ones(shape) for name, shape in beside.items()}}
    assert with_zero_dconv(tensors, given)["attn.dconv.weight"].shape == (heads, 1, 9, 1)


def test_heads_that_nothing_tells_are_asked_for() -> None:
    with pytest.raises(CheckpointError, match="100 channels"):
        with_zero_dconv({"attn.qkv.weight": torch.ones(300, 8)})
