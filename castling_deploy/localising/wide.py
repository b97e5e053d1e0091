"""What a float16 export keeps in float32, in a graph of operators: whole modules, and sums within modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from castling_deploy.export.scopes import REDUCTIONS, inside, kind, module_stack


@dataclass(frozen=True)
class Wide:
    """Operators that are computed in float32 together. `island` is the path of their module; None for one reduction.

    `name` is the module that they become in a network that is cut out of the graph.
    """

    name: str
    island: str | None
    nodes: tuple[fx.Node, ...]

    def hidden(self) -> Iterator[fx.Node]:
        """Those whose value no other operator reads: it is never rounded to float16."""
        within = set(self.nodes)
        return (node for node in self.nodes if node.users and within.issuperset(node.users))


def wide_parts(nodes: Iterable[fx.Node], islands: Sequence[str], reductions: Sequence[str]) -> tuple[Wide, ...]:
    """The wide parts of a graph, one per call of an island; `nodes` are its operators, in order.

    `islands` and `reductions` are those of a `Network`.
    """

    def part_of(node: fx.Node) -> str | fx.Node | None:
        stack = module_stack(node)
        for path in stack:
            if path and inside(path, islands):
                return path
        return node if kind(node) in REDUCTIONS and stack[-1] in reductions else None

    found: list[Wide] = []
    for part, members in groupby(nodes, key=part_of):
        if part is not None:
            island = part if isinstance(part, str) else None
            found.append(Wide(f"wide_{len(found)}", island, tuple(members)))
    return tuple(found)
