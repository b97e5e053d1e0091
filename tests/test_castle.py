"""The cast: nothing of the branch is left, nothing else changes, and what it costs is measured."""

from __future__ import annotations

import pytest
import torch
from networks import small
from torch import nn

from castling_deploy.castle import castle, measure_cast


def softmaxes(network: nn.Module) -> int:
    """Softmax nodes that torch.export sees."""
    x = torch.randn(1, 3, *network.config.image_size)  # type: ignore[misc, union-attr]
    program = torch.export.export(network, (x,))
    return sum("softmax" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("name", "before", "after"), [("deit", 2, 0), ("levit", 5, 2), ("levit-linear", 5, 0), ("mvit", 5, 0)]
)
def test_eval_keeps_the_softmax_and_the_cast_removes_it(name: str, before: int, after: int) -> None:
    """LeViT keeps the softmax of its two downsampling attentions, unless they are linear too."""
    network = small(name)
    assert softmaxes(network) == before
    assert softmaxes(castle(network)) == after


def test_the_cast_of_deit_drops_no_weight_and_that_of_levit_only_the_biases_of_the_branch() -> None:
    deit, levit = small("deit"), small("levit")
    assert castle(deit).state_dict().keys() == deit.state_dict().keys()
    dropped = levit.state_dict().keys() - castle(levit).state_dict().keys()
    assert dropped == {f"stages.{stage}.blocks.0.attn.attention_biases" for stage in range(3)}


def test_the_cast_changes_neither_the_network_nor_what_it_computes(network: nn.Module) -> None:
    x = torch.randn(2, 3, *network.config.image_size)  # type: ignore[misc, union-attr]
    before = network(x)
    castled = castle(network)
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)
    assert not torch.equal(castled(x), before)
    torch.testing.assert_close(castle(castled)(x), castled(x), rtol=0, atol=0)


def test_evidence_names_every_layer_in_order() -> None:
    network = small("levit")
    layers = measure_cast(network, torch.randn(2, 3, 64, 64))
    assert [layer.path for layer in layers] == [f"stages.{stage}.blocks.0.attn" for stage in range(3)]
    assert [layer.evidence.tokens for layer in layers] == [16, 4, 1]
    assert not any(layer.evidence.can_vanish for layer in layers), "fewer than 50 tokens"
    assert all(layer.evidence.contribution > 0 for layer in layers)
    assert measure_cast(castle(network), torch.randn(1, 3, 64, 64)) == ()
