"""A part of a graph as a module of its own, in which what stays in float32 is a module too.

Exporters keep a module in float32 by its path, and a graph has operators and no modules: so each wide part becomes one.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from castling_deploy.localising.wide import Wide


class Apart(nn.Module):
    """A graph as a module that torch.export names operators by: it looks through an fx.GraphModule (torch 2.13)."""

    def __init__(self, operators: fx.GraphModule) -> None:
        super().__init__()
        self.operators = operators

    def forward(self, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.operators(*values)


def cut(
    owner: fx.GraphModule,
    nodes: Sequence[fx.Node],
    ends: Sequence[fx.Node],
    given: Mapping[fx.Node, str],
    wide: Collection[Wide] = (),
) -> fx.GraphModule:
    """The graph that computes `ends`, with a placeholder for each node of `given`.

    `nodes` are those of the graph of `owner` that it takes, in order, placeholders among them.
    """
    graph, held = fx.Graph(), dict[str, Any]()
    copies = {node: graph.placeholder(name) for node, name in given.items()}
    order, needed = {node: at for at, node in enumerate((*given, *nodes))}, set(nodes)
    parts = {node: part for part in wide for node in part.nodes if node in needed}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
            copies[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        return copies[node]

    for node in nodes:
        part = parts.get(node)
        if node.op == "get_attr":
            continue  # copied into the module that reads it
        if part is None:
            copy(node)
        elif part.name not in held:
            inner = [one for one in part.nodes if one in needed]
            leaving = [one for one in inner if one in ends or not needed.intersection(one.users) <= set(inner)]
            taken = {source for one in inner for source in one.all_input_nodes if source.op != "get_attr"}
            sources = sorted(taken.difference(inner), key=order.__getitem__)
            names = {one: f"given_{at}" for at, one in enumerate(sources)}
            held[part.name] = Apart(cut(owner, inner, leaving, names))
            called = graph.call_module(part.name, tuple(map(copy, sources)))
            for at, one in enumerate(leaving):
                copies[one] = called if len(leaving) == 1 else graph.call_function(operator.getitem, (called, at))
    results = tuple(map(copy, ends))
    graph.output(results[0] if len(results) == 1 else results)
    for node in graph.nodes:
        if node.op == "get_attr":
            held[node.target] = operator.attrgetter(node.target)(owner)
    return fx.GraphModule(held, graph).eval()
