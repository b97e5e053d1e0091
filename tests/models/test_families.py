"""Every family: published sizes, strict loading, hyper-parameters read off the tensors, other input sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import SMALL, SMALL_DISTILLED, SMALL_LEVIT, conditioned, small

from castling_deploy.castle import castle
from castling_deploy.errors import CheckpointError, ShapeError, UsageError
from castling_deploy.inspection import _stage
from castling_deploy.models.deit import CastlingDeiT, DeiTConfig, DeiTFamily
from castling_deploy.models.family import families, family_named, family_of
from castling_deploy.models.levit import LeViTConfig, LeViTFamily, every_second, offset_index

# Softmax networks as published, plus heads * 9 weights of the token convolution per block.
PARAMETERS = {
    "castling-deit-tiny": 5_717_416 + 324,
    "castling-deit-small": 22_050_664 + 648,
    "castling-deit-base": 86_567_656 + 1296,
    "castling-deit-tiny-distilled": 5_910_800 + 324,
    "castling-deit-small-distilled": 22_436_432 + 648,
    "castling-deit-base-distilled": 87_338_192 + 1296,
    "castling-levit-128s": 7_777_058 + 522,
    "castling-levit-128": 9_213_936 + 864,
    "castling-levit-192": 10_947_069 + 504,
    "castling-levit-256": 18_893_876 + 648,
    "castling-levit-384": 39_128_836 + 972,
    "picodet-s": 992_715,
    "picodet-m": 2_152_554,
    "picodet-l": 3_305_009,
}
# Multiply-accumulates of the cast network at 224 pixels, in millions.
MACS = {"castling-deit-tiny": 1137, "castling-deit-tiny-distilled": 1143, "castling-levit-128s": 291.3}
VARIANTS = {name: (family, config) for family in families() for name, config in family.variants.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_exact(name: str) -> None:
    family, config = VARIANTS[name]
    with torch.device("meta"):
        network = family.build(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_every_variant_has_a_published_parameter_count() -> None:
    assert PARAMETERS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", MACS)
def test_macs_of_the_cast_network_are_those_of_the_specification(name: str) -> None:
    family, config = VARIANTS[name]
    macs = _stage(castle(family.build(config).eval()), (1, 3, 224, 224)).macs / 1e6
    assert macs == pytest.approx(MACS[name], rel=2e-3)


@pytest.mark.parametrize("name", SMALL)
def test_hyper_parameters_are_read_off_the_tensors(name: str) -> None:
    network = small(name)
    tensors = network.state_dict()
    family = family_of(tensors)
    size = network.config.image_size if name == "deit-distilled" else None  # 4 x 6 patches are no square
    assert family.config_of(tensors, size, network.config.aux_threshold) == network.config


@pytest.mark.parametrize("name", ["castling-deit-small", "castling-deit-base-distilled", "castling-levit-192"])
def test_published_variants_are_recognised_from_their_shapes(name: str) -> None:
    family, config = VARIANTS[name]
    with torch.device("meta"):
        tensors = family.build(config).state_dict()
    assert family_of(tensors) is not None and family_of(tensors).name == family.name
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


def test_levit_offsets_are_row_major_absolute_differences() -> None:
    index = offset_index((2, 3))
    assert index.tolist()[0] == [0, 1, 2, 3, 4, 5]
    assert index.tolist()[4] == [4, 3, 4, 1, 0, 1]
    assert offset_index((3, 3), stride=2).shape == (4, 9)
    grid = torch.arange(9.0).view(1, 9, 1)
    assert every_second(grid, (3, 3)).flatten().tolist() == [0, 2, 6, 8]


@pytest.mark.parametrize("size", [(48, 48), (64, 96), (80, 32)])
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


def test_a_softmax_network_is_not_castled_silently() -> None:
    tensors = {name: value for name, value in small("deit").state_dict().items() if "dconv" not in name}
    with pytest.raises(CheckpointError, match="softmax network"):
        family_of(tensors)


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
