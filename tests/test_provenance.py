"""torch's notes of where a node came from are shared in the block, and copied again after it."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from networks import SMALL_DEIT, conditioned
from torch.fx.traceback import NodeSource

from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.provenance import shared_provenance


def test_sources_are_shared_in_the_block_and_copied_after_it() -> None:
    source = NodeSource(None)
    with shared_provenance():
        with shared_provenance():
            pass
        assert copy.deepcopy([source])[0] is source
    assert copy.deepcopy([source])[0] is not source


def test_the_same_graph_comes_out_with_the_same_descent() -> None:
    network = conditioned(CastlingDeiT(replace(SMALL_DEIT, depth=1)))
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def decomposed() -> tuple[str, list[list[str]]]:
        graph = torch.export.export(network, (image,)).run_decompositions({}).graph
        sources = [[source.name for source in node.meta.get("from_node", [])] for node in graph.nodes]
        return str(graph), sources

    with shared_provenance():
        shared = decomposed()
    assert shared == decomposed() and any(shared[1])
