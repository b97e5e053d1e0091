"""XNNPACK's lowering searches for attention where there may be some, and builds no pattern for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from castling_deploy.export.xnnpack_patterns import needed_patterns

pytest.importorskip("executorch")


def program(module: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module, (torch.randn(1, 3, 8, 8),))


def test_a_network_without_softmax_is_not_searched_for_attention() -> None:
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    before = sdpa.get_graphs, bilinear_2d.get_graphs_dict
    with pytest.raises(ValueError), needed_patterns(program(nn.Conv2d(3, 3, 1))):
        assert sdpa.get_graphs() == [] and bilinear_2d.get_graphs_dict() == {}
        raise ValueError
    assert (sdpa.get_graphs, bilinear_2d.get_graphs_dict) == before


def test_what_may_be_there_is_searched_for() -> None:
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(8, 8)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    before = sdpa.get_graphs, bilinear_2d.get_graphs_dict
    whole = program(nn.Sequential(Attention(), nn.Upsample(scale_factor=2, mode="bilinear")))
    for asked in (whole, whole.run_decompositions({})):
        with needed_patterns(asked):
            assert (sdpa.get_graphs, bilinear_2d.get_graphs_dict) == before


def test_a_softmax_alone_is_no_attention_of_torch() -> None:
    """As LeViT's: the scale is in the weights of q."""
    from executorch.backends.xnnpack.partition.graphs import sdpa

    before = sdpa.get_graphs
    with needed_patterns(program(nn.Sequential(nn.Softmax(-1), nn.Conv2d(3, 3, 1)))):
        assert sdpa.get_graphs is not before
