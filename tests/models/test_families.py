"""Every family: published sizes, strict loading, hyper-parameters read off the tensors, other input sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from networks import SMALL, SMALL_DISTILLED, SMALL_LEVIT, SMALL_MVIT, conditioned, small
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.errors import CheckpointError, ShapeError, UsageError
from castling_deploy.fold import fold
from castling_deploy.models.attention import linear_angular, unit, value_scale
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.deit_family import DeiTFamily
from castling_deploy.models.family import families, family_named, family_of, names_baseline
from castling_deploy.models.levit_attention import EverySecond, offset_index
from castling_deploy.models.levit_config import LeViTConfig
from castling_deploy.models.levit_family import LeViTFamily
from castling_deploy.models.mvit_attention import distance_index, pooled_value_scale
from castling_deploy.models.mvit_config import MViTv2Config, place_of
from castling_deploy.models.mvit_family import MViTv2Family
from castling_deploy.work import work_of

# Softmax networks as published, and the heads * 9 weights that the token convolution of every block adds.
PUBLISHED = {
    "deit-tiny": (5_717_416, 324),
    "deit-small": (22_050_664, 648),
    "deit-base": (86_567_656, 1296),
    "deit-tiny-distilled": (5_910_800, 324),
    "deit-small-distilled": (22_436_432, 648),
    "deit-base-distilled": (87_338_192, 1296),
    "levit-128s": (7_777_058, 522),
    "levit-128": (9_213_936, 864),
    "levit-192": (10_947_069, 504),
    "levit-256": (18_893_876, 648),
    "levit-384": (39_128_836, 972),
    "mvitv2-tiny": (24_173_320, 369),
    "mvitv2-small": (34_870_216, 585),
    "mvitv2-base": (51_472_744, 864),
}
PARAMETERS = {
    **{name: softmax for name, (softmax, _) in PUBLISHED.items()},
    **{f"castling-{name}": softmax + dconv for name, (softmax, dconv) in PUBLISHED.items()},
    "picodet-s": 992_715,
    "picodet-m": 2_152_554,
    "picodet-l": 3_305_009,
}
# Multiply-accumulates at 224 pixels, in millions: of the cast network, and of the softmax baseline.
MACS = {
    "castling-deit-tiny": 1137,
    "castling-deit-tiny-distilled": 1143,
    "castling-levit-128s": 291.3,
    "castling-mvitv2-tiny": 4190,
    "castling-mvitv2-small": 6370,
    "castling-mvitv2-base": 9340,
    "deit-tiny": 1254,
    "deit-base-distilled": 17657,
    "levit-128s": 304.7,
    "levit-384": 2351.8,
    "mvitv2-tiny": 4677,
    "mvitv2-base": 10102,
}
VARIANTS = {name: (family, config) for family in families() for name, config in family.variants.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_exact(name: str) -> None:
    family, config = VARIANTS[name]
    with torch.device("meta"):
        network = family.build(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_every_variant_has_a_published_parameter_count() -> None:
    published = {
        name for name, (family, _) in VARIANTS.items() if family.task == "classification" or family.name == "picodet"
    }
    assert PARAMETERS.keys() == published  # the other dense networks are the project's own wiring


@pytest.mark.parametrize("name", MACS)
def test_macs_are_those_of_the_specification(name: str) -> None:
    family, config = VARIANTS[name]
    with torch.device("meta"):
        macs = work_of(castle(family.build(config).eval()), (1, 3, 224, 224)).macs / 1e6
    assert macs == pytest.approx(MACS[name], rel=2e-3)


@pytest.mark.parametrize("name, parameters", [("tiny", 24_092_281), ("small", 34_758_289), ("base", 51_300_808)])
def test_the_cast_takes_the_relative_positions_off_mvit(name: str, parameters: int) -> None:
    family, config = VARIANTS[f"castling-mvitv2-{name}"]
    with torch.device("meta"):
        castled = castle(family.build(config))
    assert sum(parameter.numel() for parameter in castled.parameters()) == parameters


@pytest.mark.parametrize("name", SMALL)
def test_hyper_parameters_are_read_off_the_tensors(name: str) -> None:
    network = small(name)
    tensors = network.state_dict()
    family = family_of(tensors)
    size = (
        network.config.image_size if name in ("deit-distilled", "levit-linear") else None
    )  # 4 x 6 tokens are no square
    assert family.config_of(tensors, size, network.config.aux_threshold) == network.config


@pytest.mark.parametrize(
    "name",
    [
        "castling-deit-small",
        "castling-deit-base-distilled",
        "castling-levit-192",
        "castling-mvitv2-base",
        "deit-base",
        "levit-384",
        "mvitv2-small",
    ],
)
def test_published_variants_are_recognised_from_their_shapes(name: str) -> None:
    family, config = VARIANTS[name]
    with torch.device("meta"):
        tensors = family.build(config).state_dict()
    assert family_of(tensors, softmax=names_baseline(name)).name == family.name
    assert family.config_of(tensors, None, config.aux_threshold) == config


def test_deit_has_the_names_of_facebook_and_timm() -> None:
    with torch.device("meta"):
        names = set(CastlingDeiT(replace(SMALL_DISTILLED, depth=1)).state_dict())
    assert names == {
        "cls_token",
        "dist_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(
            f"blocks.0.{layer}.{kind}"
            for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        ),
        "blocks.0.attn.dconv.weight",
        *(f"{layer}.{kind}" for layer in ("norm", "head", "head_dist") for kind in ("weight", "bias")),
    }


def test_levit_has_the_names_of_timm() -> None:
    names = set(small("levit").state_dict())
    for expected in (
        "stem.conv4.linear.weight",
        "stem.conv4.bn.running_var",
        "stages.0.blocks.0.attn.qkv.linear.weight",
        "stages.0.blocks.0.attn.proj.ln.bn.weight",
        "stages.0.blocks.0.attn.attention_biases",
        "stages.1.downsample.attn_downsample.kv.linear.weight",
        "stages.1.downsample.attn_downsample.q.ln.linear.weight",
        "stages.1.downsample.attn_downsample.proj.ln.linear.weight",
        "stages.1.downsample.attn_downsample.attention_biases",
        "stages.2.downsample.mlp.ln1.linear.weight",
        "stages.2.blocks.0.mlp.ln2.bn.bias",
        "head.bn.weight",
        "head.linear.weight",
        "head_dist.linear.bias",
    ):
        assert expected in names
    assert not any("index" in name for name in names), "bias indices are no weights"


def test_distilled_eval_output_is_the_mean_of_two_heads_and_training_returns_both() -> None:
    for name in ("deit-distilled", "levit"):
        network = small(name)
        x = torch.randn(2, 3, *network.config.image_size)
        first = network(x)
        outputs: list[torch.Tensor] = []
        for head in (network.head, network.head_dist):
            head.register_forward_hook(lambda module, inputs, output, outputs=outputs: outputs.append(output))
        torch.testing.assert_close(network(x), (outputs[-2] + outputs[-1]) / 2)
        torch.testing.assert_close(first, network(x))
        assert isinstance(network.train()(x), tuple)


def test_mvit_has_the_names_of_timm_and_its_relative_positions_belong_to_the_branch() -> None:
    network = small("mvit")
    names = {name for name in network.state_dict() if name.startswith("stages.1.blocks.0.")}
    weighted = ("norm1", "norm2", "attn.qkv", "attn.proj", "attn.norm_q", "attn.norm_k", "attn.norm_v")
    positions = {f"attn.rel_pos_{axis}" for axis in "hw"}
    assert {name.removeprefix("stages.1.blocks.0.") for name in names} == {
        *(f"{layer}.{kind}" for layer in (*weighted, "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
        "shortcut_proj_attn.weight",
        "shortcut_proj_attn.bias",
        *(f"attn.{layer}.weight" for layer in ("pool_q", "pool_k", "pool_v", "dconv")),
        *positions,
    }
    dropped = network.state_dict().keys() - castle(network).state_dict().keys()
    assert dropped == {
        f"stages.{s}.blocks.{b}.{name}" for s in range(4) for b in range(1 + (s == 2)) for name in positions
    }


def test_mvit_counts_distances_on_the_finest_grid_of_the_original() -> None:
    assert distance_index(2, 2, 4).tolist() == [[2, 0], [4, 2]], "two of four tokens are two apart"
    assert distance_index(2, 4, 4).tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
    config = MViTv2Config()
    tables = [place_of(config, stage, block).table[0] for stage in range(4) for block in range(2)]
    assert tables == [56, 56, 28, 28, 28, 14, 14, 7]
    assert [place_of(config, stage, 0).queries for stage in range(4)] == [(56, 56), (28, 28), (14, 14), (7, 7)]


def test_mvit_adds_the_pooled_queries_after_the_normalisation() -> None:
    attention = castle(small("mvit")).get_submodule("stages.1.blocks.0.attn")
    x = torch.randn(2, 16 * 24, 16)
    q, k, v = attention.split(x)  # type: ignore[operator]
    assert q.shape == k.shape == v.shape == (2, 2, 8 * 12, 16)
    y = unit(linear_angular(q, k, v)) + attention.dconv(v) + q  # type: ignore[operator]
    torch.testing.assert_close(attention(x), attention.proj(y.transpose(1, 2).flatten(2)))  # type: ignore[operator]


@pytest.mark.parametrize("tokens", [49, 784, 3136, 16384])
def test_mvit_scales_its_values_so_that_no_input_overflows_float16(tokens: int) -> None:
    norm = conditioned(nn.Sequential(nn.LayerNorm(96, 1e-6)))[0]  # type: ignore[index]
    largest = 96**0.5 * norm.weight.abs().max() + norm.bias.norm()
    scale = pooled_value_scale(tokens, norm)
    assert (scale * largest * (1 + 2 * tokens / math.pi)) ** 2 < 65504
    assert value_scale(tokens) / 16 <= scale <= value_scale(tokens) and math.log2(scale).is_integer()


def test_mvit_without_relative_positions_is_read_too() -> None:
    config = replace(SMALL_MVIT, positions=False)
    tensors = conditioned(MViTv2Family().build(config)).state_dict()
    assert not any("rel_pos" in name for name in tensors)
    assert MViTv2Family().config_of(tensors, (64, 96), config.aux_threshold) == config


def test_levit_offsets_are_row_major_absolute_differences() -> None:
    index = offset_index((2, 3))
    assert index.tolist()[0] == [0, 1, 2, 3, 4, 5]
    assert index.tolist()[4] == [4, 3, 4, 1, 0, 1]
    assert offset_index((3, 3), stride=2).shape == (4, 9)
    grid = torch.arange(9.0).view(1, 9, 1)
    assert EverySecond((3, 3))(grid).flatten().tolist() == [0, 2, 6, 8]


def test_linear_downsampling_takes_identity_and_token_convolution_at_the_tokens_that_ask() -> None:
    down = castle(small("levit-linear")).get_submodule("stages.1.downsample.attn_downsample")
    x = torch.randn(2, 4 * 6, 32)
    q, k, v = down.split(x)  # type: ignore[operator]
    assert q.shape == (2, 2, 6, 16) and k.shape == (2, 2, 24, 16) and v.shape == (2, 2, 24, 64)
    asking = [0, 2, 4, 12, 14, 16]
    y = unit(v[:, :, asking] / 2 + unit(q) @ (unit(k).transpose(2, 3) @ v) / math.pi) + down.dconv(v)[:, :, asking]  # type: ignore[operator]
    torch.testing.assert_close(down(x), down.proj(y.transpose(1, 2).flatten(2)))  # type: ignore[operator]


@pytest.mark.parametrize("name, parameters, macs", [("128s", 7_366_890, 287.2), ("384", 38_295_952, 2283.5)])
def test_levit_with_linear_downsampling_has_the_specified_size_and_work(
    name: str, parameters: int, macs: float
) -> None:
    """The specification leaves out the token convolution of the downsampling: nine taps on values of 4 C channels."""
    family, config = VARIANTS[f"castling-levit-{name}"]
    castled = castle(family.build(replace(config, down="linear")).eval())
    assert sum(parameter.numel() for parameter in fold(castled).parameters()) == parameters
    taps = 9 * 4 * (196 * config.widths[0] + 49 * config.widths[1]) / 1e6
    assert work_of(castled, (1, 3, 224, 224)).macs / 1e6 - taps == pytest.approx(macs, abs=0.1)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_networks_run_at_other_sizes_after_resizing_their_tables(name: str, size: tuple[int, int]) -> None:
    network = small(name)
    family = family_of(network.state_dict())
    tensors, config = family.resized(network.state_dict(), network.config, size)
    resized = family.build(config).eval()
    resized.load_state_dict(dict(tensors))
    assert resized(torch.randn(2, 3, *size)).shape == (2, 10)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    for name in SMALL:
        network = small(name)
        tensors, config = family_of(network.state_dict()).resized(
            network.state_dict(), network.config, network.config.image_size
        )
        assert config == network.config
        for key, value in network.state_dict().items():
            torch.testing.assert_close(tensors[key], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_and_class_counts_can_be_built(channels: int) -> None:
    for build, config in SMALL.values():
        network = conditioned(build(replace(config, channels=channels, classes=7)))  # type: ignore[type-var, operator]
        assert network(torch.randn(1, channels, *config.image_size)).shape == (1, 7)


def test_foreign_tensors_are_refused_with_what_is_known() -> None:
    with pytest.raises(CheckpointError, match="no Castling network") as caught:
        family_of({"conv1.weight": torch.zeros(1)})
    assert "castling-deit" in (caught.value.hint or "")


def test_unknown_family_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        family_named("castling-deti")
    assert "castling-deit" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeiTConfig(image_size=(225, 224)), "225 x 224"),
        (lambda: LeViTConfig(image_size=(8, 224)), "8 x 224"),
        (lambda: MViTv2Config(image_size=(224, 240)), "224 x 240"),
        (lambda: MViTv2Config(heads=(1, 5, 4, 8)), "5, 4, 8"),
        (lambda: LeViTConfig(widths=(100, 256, 384)), "key dimension"),
    ],
)
def test_impossible_configurations_are_refused(build: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        build()  # type: ignore[operator]


def test_image_size_that_shapes_do_not_tell_is_asked_for() -> None:
    tensors = small("deit-distilled").state_dict()
    with pytest.raises(CheckpointError, match="24 tokens"):
        DeiTFamily().config_of(tensors, None, 0.02)
    rectangle = conditioned(LeViTFamily().build(replace(SMALL_LEVIT, image_size=(64, 96)))).state_dict()
    with pytest.raises(CheckpointError, match="24 tokens"):
        LeViTFamily().config_of(rectangle, None, 0.02)
