"""Semantic FPN: mmsegmentation's names, exact folds, the image's size whatever the backbone."""

from __future__ import annotations

import pytest
import torch
from networks import conditioned
from torch import nn

from castling_deploy import fold as algebra
from castling_deploy.fold import FoldStep, fold
from castling_deploy.models.semantic_fpn import FeaturePyramid, SemanticFpnHead, branch

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Feature widths at strides 4, 8, 16, 32: Castling-LeViT-128S (stem, stem, two stages) and Castling-MViTv2.
BACKBONES = {"levit-128s": (32, 64, 128, 256), "mvitv2": (96, 192, 384, 768)}


class OneScale(nn.Module):
    """A pyramid and a head as a network over DeiT has them; takes the four maps of its blocks."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.neck = FeaturePyramid(channels)
        self.decode_head = SemanticFpnHead(4 * [channels], 16, classes)

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        return self.decode_head(self.neck(features))


def maps(widths: tuple[int, ...], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, width, *size, generator=generator, dtype=torch.float64) for width, size in zip(widths, sizes)
    ]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_have_the_images_size(backbone: str) -> None:
    head = conditioned(SemanticFpnHead(BACKBONES[backbone], 16, 5)).double()
    features = maps(BACKBONES[backbone], [(16, 24), (8, 12), (4, 6), (2, 3)])
    assert head(features).shape == (2, 5, 64, 96)


def test_names_are_those_of_mmsegmentation() -> None:
    convs = [f"decode_head.scale_heads.{k}.{2 * j}" for k, number in enumerate((1, 1, 2, 3)) for j in range(number)]
    assert set(OneScale(8, 3).state_dict()) == {
        *(f"{conv}.conv.weight" for conv in convs),
        *(f"{conv}.bn.{kind}" for conv in convs for kind in NORM),
        *(f"neck.upsample_4x.1.{kind}" for kind in NORM),
        *(
            f"{layer}.{kind}"
            for layer in ("decode_head.conv_seg", "neck.upsample_4x.0", "neck.upsample_4x.3", "neck.upsample_2x.0")
            for kind in ("weight", "bias")
        ),
    }


def test_the_size_of_the_decoder_is_that_of_its_convolutions() -> None:
    """9 C_in C and two BatchNorm vectors per convolution, and the classifier."""
    head = SemanticFpnHead((96, 192, 384, 768), 128, 150)
    inputs = [96, 192, 384, 128, 768, 128, 128]
    assert sum(p.numel() for p in head.parameters()) == sum(9 * i * 128 + 256 for i in inputs) + 128 * 150 + 150


@pytest.mark.parametrize("seed", range(3))
def test_fold_is_exact_in_float64(seed: int) -> None:
    steps: list[FoldStep] = []
    network = conditioned(OneScale(8, 3), seed).double()
    features = maps((8, 8, 8, 8), 4 * [(4, 6)])
    folded = fold(network, steps.append)
    assert relative(folded(*features), network(*features)) < 1e-12
    assert {step.path for step in steps} >= {"neck.upsample_4x", "decode_head.scale_heads.3.4"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_conv_then_batchnorm_is_one_transposed_conv(groups: int, bias: bool) -> None:
    conv = nn.ConvTranspose2d(6, 12, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias).double()
    norm = conditioned(nn.Sequential(nn.BatchNorm2d(12)))[0].double()  # type: ignore[index]
    before = conv.weight.clone()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    folded = algebra.affine_after_transposed(conv, algebra.batchnorm_affine(norm))
    assert relative(folded(x), norm(conv(x))) < 1e-12
    assert torch.equal(conv.weight, before) and (conv.bias is not None) == bias


def test_a_single_scale_becomes_strides_4_to_32() -> None:
    sizes = [tuple(x.shape) for x in FeaturePyramid(8)(4 * [torch.randn(1, 8, 4, 6)])]
    assert sizes == [(1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3)]


@pytest.mark.parametrize(("doublings", "convolutions"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_branch_has_a_convolution_per_doubling(doublings: int, convolutions: int) -> None:
    layers = branch(8, 4, doublings)
    assert sum(isinstance(layer, nn.Upsample) for layer in layers) == doublings
    assert len(layers) == convolutions + doublings
    assert layers(torch.randn(1, 8, 2, 3)).shape == (1, 4, 2 * 2**doublings, 3 * 2**doublings)


def test_maps_of_rounded_sizes_are_resized_to_the_finest() -> None:
    """An image of 48 x 80 pixels: the map of stride 32 has 2 x 3 cells where 1.5 x 2.5 would fit."""
    head = conditioned(SemanticFpnHead((4, 6, 8, 10), 16, 5)).double()
    features = maps((4, 6, 8, 10), [(12, 20), (6, 10), (3, 5), (2, 3)])
    logits = head(features)
    assert logits.shape == (2, 5, 48, 80)
    assert relative(fold(head)(features), logits) < 1e-12


def test_a_wrong_number_of_maps_is_an_error() -> None:
    head = SemanticFpnHead((4, 6, 8, 10), 16, 5).eval()
    with pytest.raises(ValueError, match="zip"):
        head([torch.randn(1, width, 8, 8) for width in (4, 6, 8)])
