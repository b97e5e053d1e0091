"""An RMSNorm stands for a LayerNorm of tokens without mean, and for no other."""

from __future__ import annotations

import pytest
import torch
from networks import BASELINES, SMALL, small
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.export.rms_norms import in_rms_norms
from castling_deploy.fold import ZeroMeanNorm, fold


def kinds(network: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in network.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))}


@pytest.mark.parametrize("name", [*SMALL, *BASELINES])
def test_a_network_is_exact_in_float64(name: str) -> None:
    castled = castle(small(name)).double()
    folded = fold(castled)
    x = torch.randn(2, 3, *castled.config.image_size, dtype=torch.float64)  # type: ignore[union-attr, misc]
    expected, actual = castled(x), in_rms_norms(folded)(x)
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-12


def test_the_norms_of_a_stream_without_mean_are_replaced_in_a_copy() -> None:
    folded = fold(castle(small("deit")))
    assert kinds(in_rms_norms(folded)) == {nn.RMSNorm}
    assert kinds(folded) == {ZeroMeanNorm}


def test_a_norm_that_has_a_mean_to_subtract_stays() -> None:
    norms = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), ZeroMeanNorm(nn.LayerNorm(8, eps=1e-3)))
    plain, replaced = in_rms_norms(norms)
    assert isinstance(plain, nn.LayerNorm)
    assert isinstance(replaced, nn.RMSNorm) and replaced.eps == 1e-3
