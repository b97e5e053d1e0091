"""A small network with one layer that float16 cannot hold, and its ladder."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from folded_networks import network_of
from networks import SMALL_DEIT, conditioned
from torch import nn

from castling_deploy.ladder import Ladder, climb
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.layers import Mlp
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import probes_for
from castling_deploy.target import Network
from castling_deploy.task import task_named

LAYER = "blocks.0.mlp"
FACTOR = 2.0**14  # what the hidden values of LAYER are multiplied by, and the weights after them divided by


@torch.no_grad()
def planted_network(factor: float = FACTOR) -> nn.Module:
    """In training form: the first of a DeiT's two blocks has hidden values `factor` times what they were.

    Not the last: what it makes of other tokens than the class token reaches no output.
    """
    network = conditioned(CastlingDeiT(SMALL_DEIT))
    mlp = network.get_submodule(LAYER)
    assert isinstance(mlp, Mlp)
    for tensor in (mlp.fc1.weight, mlp.fc1.bias):
        tensor.mul_(factor)
    mlp.fc2.weight.div_(factor)
    return network


@cache
def planted(factor: float = FACTOR) -> Ladder:
    """The ladder of the planted network, on photographs and the structured images."""
    probes = probes_for(Preprocessing(SMALL_DEIT.image_size), None)
    return climb(planted_network(factor), task_named("classification"), ("logits",), probes)


def exporters_view(ladder: Ladder, islands: tuple[str, ...] = (), reductions: tuple[str, ...] = ()) -> Network:
    """What an exporter is handed of it, with these modules to keep in float32."""
    network = network_of(ladder.folded, SMALL_DEIT.image_size)
    return replace(network, islands=islands, reductions=reductions)
