"""PicoDet: the published sizes, the names of the mmdet port, exact folds, outputs as the export contract names them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import conditioned
from torch import nn

from castling_deploy.errors import ShapeError
from castling_deploy.fold import FoldStep, fold
from castling_deploy.models.csp_pan import CspPan
from castling_deploy.models.dense import DenseConfig
from castling_deploy.models.detector import PicoDetHead, picodet
from castling_deploy.models.esnet import ESNetConfig, SqueezeExcite, shuffled
from castling_deploy.models.pico_head import Integral, PicoHead, output_names
from castling_deploy.work import work_of

FAMILY = picodet()
VARIANTS = FAMILY.variants
TINY = DenseConfig(
    ESNetConfig(stem=8, widths=(16, 24, 32), middles=((16, 8), (16, 24, 24), (32,)), image_size=(64, 96)),
    PicoDetHead(width=16, convs=1, reg_max=5),
    classes=3,
)
# Backbone, neck, head.
PARAMETERS = {
    "picodet-s": (603_659, 249_600, 139_456),
    "picodet-m": (1_338_026, 435_200, 379_328),
    "picodet-l": (2_077_041, 672_000, 555_968),
}
# Multiply-accumulates of the whole network and of its backbone, in 1e9, at 320, 416 and 640 pixels.
GMACS = {
    "picodet-s": ((0.351, 0.163), (0.593, 0.275), (1.404, 0.651)),
    "picodet-m": ((0.716, 0.315), (1.211, 0.533), (2.865, 1.261)),
    "picodet-l": ((1.084, 0.478), (1.834, 0.807), (4.336, 1.910)),
}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(seed: int = 0) -> nn.Module:
    return conditioned(FAMILY.build(TINY), seed)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_exact(name: str) -> None:
    with torch.device("meta"):
        network = FAMILY.build(VARIANTS[name])
    assert (size(network.backbone), size(network.neck), size(network.bbox_head)) == PARAMETERS[name]
    assert size(network) == sum(PARAMETERS[name])


def test_totals_are_the_published_ones() -> None:
    assert [sum(parts) for parts in PARAMETERS.values()] == [992_715, 2_152_554, 3_305_009]


@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_those_of_the_specification(name: str) -> None:
    network = FAMILY.build(VARIANTS[name]).eval()
    for side, (whole, backbone) in zip((320, 416, 640), GMACS[name]):
        shape = (1, 3, side, side)
        assert work_of(network, shape).macs / 1e9 == pytest.approx(whole, rel=5e-3)
        assert work_of(network.backbone, shape).macs / 1e9 == pytest.approx(backbone, rel=5e-3)


@pytest.mark.parametrize(("name", "scale"), [("picodet-s", 0.75), ("picodet-m", 1.0), ("picodet-l", 1.25)])
def test_widths_follow_from_the_published_scale_and_ratios(name: str, scale: float) -> None:
    small = ((0.875, 0.5, 0.5), (0.5, 0.625, 0.5, 0.625, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    large = ((0.875, 0.5, 1.0), (0.625, 0.5, 0.75, 0.625, 0.625, 0.5, 0.625), (1.0, 0.625, 0.75))

    def divisible(value: float, divisor: int) -> int:
        return max(divisor, int(value + divisor / 2) // divisor * divisor)

    config = VARIANTS[name].backbone
    assert config.widths == tuple(divisible(width * scale, 16) for width in (128, 256, 512))
    assert config.middles == tuple(
        tuple(divisible(int(width * ratio), 8) for ratio in ratios)
        for width, ratios in zip(config.widths, small if name == "picodet-s" else large)
    )


def test_names_are_those_of_the_mmdet_port() -> None:
    with torch.device("meta"):
        names = set(FAMILY.build(VARIANTS["picodet-m"]).state_dict())
    separable = ("depthwise_conv", "pointwise_conv")
    down = ("conv_dw_1", "conv_linear_1", "conv_pw_2", "conv_dw_2", "conv_linear_2", "conv_dw_mv1", "conv_pw_mv1")
    blocks = [f"{stage}_{block}" for stage, depth in ((2, 3), (3, 7), (4, 3)) for block in range(1, depth + 1)]
    convs = [
        "backbone.conv1",
        *(
            f"backbone.{b}.{c}"
            for b in blocks
            for c in (down if b.endswith("_1") else ("conv_pw", "conv_dw", "conv_linear"))
        ),
        *(f"neck.trans.trans.{i}" for i in range(3)),
        *(f"neck.{top}_top_conv.{conv}" for top in ("first", "second") for conv in separable),
        *(f"neck.downsamples.{i}.{conv}" for i in range(2) for conv in separable),
        *(
            f"neck.{way}_blocks.{i}.{conv}"
            for way in ("top_down", "bottom_up")
            for i in range(2)
            for conv in (
                "main_conv",
                "short_conv",
                "final_conv",
                "blocks.0.conv1",
                *(f"blocks.0.conv2.{c}" for c in separable),
            )
        ),
        *(f"bbox_head.cls_convs.{level}.{i}.{conv}" for level in range(4) for i in range(4) for conv in separable),
    ]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    biased = [
        *(f"backbone.{b}.se.conv{i}.conv" for b in blocks for i in (1, 2)),
        *(f"bbox_head.gfl_cls.{level}" for level in range(4)),
    ]
    assert names == {
        "bbox_head.integral.project",
        *(f"{conv}.conv.weight" for conv in convs),
        *(f"{conv}.bn.{kind}" for conv in convs for kind in norm),
        *(f"{layer}.{kind}" for layer in biased for kind in ("weight", "bias")),
    }


@pytest.mark.parametrize("seed", range(3))
def test_fold_is_exact_in_float64(seed: int) -> None:
    network = tiny(seed).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for folded, expected in zip(fold(network)(x), network(x)):
        assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_fold_leaves_convolutions_only_and_names_its_rules() -> None:
    steps: list[FoldStep] = []
    folded = fold(tiny(), steps.append)
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.Hardsigmoid, Integral)) for module in folded.modules())
    assert FoldStep("backbone.conv1", "Conv+BN") in steps
    assert FoldStep("backbone.2_1.se", SqueezeExcite.fold_rule) in steps
    assert FoldStep("bbox_head", PicoHead.fold_rule) in steps
    assert not dict(folded.named_buffers())


def test_hard_sigmoid_saturates_on_both_sides_after_the_fold() -> None:
    gate = SqueezeExcite(8).double().requires_grad_(False)
    gate.conv2.conv.bias.copy_(torch.tensor([-9.0, -3.1, -2.9, -1.0, 0.0, 2.9, 3.1, 9.0]))  # type: ignore[union-attr]
    x = torch.rand(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(gate.folded()(x), gate(x), rtol=1e-13, atol=1e-13)


def test_outputs_are_scores_then_distances_of_every_level() -> None:
    outputs = dict(zip(output_names(), tiny()(torch.randn(2, 3, 64, 96)), strict=True))
    cells = {8: 96, 16: 24, 32: 6, 64: 2}  # the level of stride 64 has ceil(64 / 64) x ceil(96 / 64)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        **{f"cls_pred_stride_{stride}": (2, number, 3) for stride, number in cells.items()},
        **{f"dis_pred_stride_{stride}": (2, number, 24) for stride, number in cells.items()},
    }
    assert all(
        0 <= outputs[f"cls_pred_stride_{stride}"].min() <= outputs[f"cls_pred_stride_{stride}"].max() <= 1
        for stride in cells
    )


def test_cells_are_in_raster_order() -> None:
    head = conditioned(PicoHead(2, 8, 0, reg_max=3, levels=1))
    x = torch.randn(1, 8, 3, 5)
    scores, distances = head([x])
    cell = head.gfl_cls[0](x)[0, :, 1, 2]  # type: ignore[index]
    torch.testing.assert_close(scores[0, 1 * 5 + 2], cell[:2].sigmoid())
    torch.testing.assert_close(distances[0, 1 * 5 + 2], cell[2:])


def test_an_untrained_head_gives_every_class_one_percent() -> None:
    head = PicoHead(80, 96, 2).eval()
    scores = head([torch.randn(1, 96, side, side) for side in (8, 4, 2, 1)])[0]
    assert scores.mean().item() == pytest.approx(0.01, rel=0.1)


def test_integral_is_the_mean_of_the_distribution() -> None:
    peaks = torch.full((1, 4, 8), -50.0)
    for side, value in enumerate((0, 3, 5, 7)):
        peaks[0, side, value] = 50
    torch.testing.assert_close(Integral(7)(peaks.flatten(1)), torch.tensor([[0.0, 3.0, 5.0, 7.0]]))
    torch.testing.assert_close(Integral(7)(torch.zeros(1, 32)), torch.full((1, 4), 3.5))


def test_shuffle_interleaves_the_halves() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffled(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_neck_and_head_take_any_backbones_features() -> None:
    """Features as Castling-LeViT-128S has them at 256 pixels: the stem's third map, then two stages."""
    neck, head = CspPan((64, 128, 256), 32), PicoHead(7, 32, 1)
    features = [torch.randn(1, width, side, side) for width, side in ((64, 32), (128, 16), (256, 8))]
    maps = neck(features)
    assert [tuple(x.shape) for x in maps] == [(1, 32, side, side) for side in (32, 16, 8, 4)]
    assert [x.shape[1] for x in head(maps)] == 2 * [1024, 256, 64, 16]


@pytest.mark.parametrize(
    "config", [*VARIANTS.values(), TINY, replace(TINY, backbone=replace(TINY.backbone, channels=1), classes=10)]
)
def test_hyper_parameters_are_read_off_the_tensors(config: DenseConfig) -> None:
    with torch.device("meta"):
        tensors = FAMILY.build(config).state_dict()
    assert FAMILY.recognises(tensors)
    size = None if config in VARIANTS.values() else config.image_size
    assert FAMILY.config_of(tensors, size, config.aux_threshold) == config


def test_another_size_needs_no_other_tensors() -> None:
    network = tiny()
    tensors, config = FAMILY.resized(network.state_dict(), TINY, (96, 32))
    other = FAMILY.build(config)
    other.load_state_dict(dict(tensors))
    assert other.eval()(torch.randn(1, 3, 96, 32))[0].shape == (1, 48, 3)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ShapeError, match="100 x 96"):
        replace(TINY, backbone=replace(TINY.backbone, image_size=(100, 96)))
    with pytest.raises(ShapeError, match="15 are odd"):
        PicoDetHead(width=15)
    with pytest.raises(ShapeError, match="25 are odd"):
        replace(TINY.backbone, widths=(16, 25, 32))
