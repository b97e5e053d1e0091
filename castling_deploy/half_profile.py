"""Where float16 loses what a network says: its modules rounded one by one, the rest in float32.

Rounding errors of single pixels average out over an image. On a flat image every pixel makes the same error and nothing
averages: the first convolutions of a stem can cost more than all that follows. A module that alone takes a large share
of what the gate allows is worth float32, where float16 as a whole comes near the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from castling_deploy.export.scopes import inside, module_stack
from castling_deploy.parity import TOLERANCES, Reference, worst
from castling_deploy.target import Precision

LIMIT = TOLERANCES[Precision.FP16].limit
NEAR = LIMIT / 2  # of the whole network: below, runtimes have the same again for what they round differently
LARGE = LIMIT / 10  # of a module alone


@dataclass(frozen=True)
class Share:
    """rel of the outputs when the module at `path` alone is rounded to float16, weights and results."""

    path: str
    rel: float


@dataclass(frozen=True)
class Profile:
    """`whole` is the rel of the network rounded everywhere; `shares` of the modules that were looked at, in order.

    A module was looked at when the one around it takes a large share; `islands` are the innermost that do.
    """

    whole: float
    shares: tuple[Share, ...] = ()
    islands: tuple[Share, ...] = ()


def profile(
    graph: fx.GraphModule, images: torch.Tensor, references: Mapping[str, Reference], wide: Sequence[str] = ()
) -> Profile:
    """The profile of an exported network (float32) on `images`, a batch of the size that it was traced with.

    `references` are the outputs that every artefact is compared with, in the order in which the network returns them;
    `wide` are modules that are in float32 in any case.
    """
    stacks = [module_stack(node) for node in graph.graph.nodes if node.op == "call_function"]
    expected = _run(graph, images, lambda path: False)

    def rel(rounded: Callable[[str], bool]) -> float:
        outputs = _run(graph, images, lambda path: rounded(path) and not inside(path, wide))
        found = (
            reference.rel(actual.numpy(), wanted.numpy())
            for reference, actual, wanted in zip(references.values(), outputs, expected, strict=True)
        )
        return worst(found) or 0.0

    whole = rel(lambda path: True)
    if whole <= NEAR:
        return Profile(whole)
    shares: list[Share] = []
    islands = list(_descend("", stacks, rel, shares))
    return Profile(whole, tuple(shares), tuple(islands))


def _descend(
    path: str, stacks: Sequence[tuple[str, ...]], rel: Callable[[Callable[[str], bool]], float], shares: list[Share]
) -> Iterator[Share]:
    """The innermost modules below `path` that take a large share."""
    for child in children(path, stacks):
        share = Share(child, rel(lambda path, child=child: inside(path, (child,))))  # type: ignore[misc]
        shares.append(share)
        if share.rel <= LARGE:
            continue
        below = list(_descend(child, stacks, rel, shares))
        yield from below
        if not below and rel(lambda path, child=child: path == child) > LARGE:  # type: ignore[misc]
            yield share  # of its own operations, not of many small parts


def children(path: str, stacks: Iterable[tuple[str, ...]]) -> list[str]:
    """The modules that are called directly inside a call of the module at `path`, in the order of the calls."""
    found: dict[str, None] = {}
    for stack in stacks:
        if path in stack[:-1]:
            found[stack[stack.index(path) + 1]] = None
    return [child for child in found if child != path]


def _run(graph: fx.GraphModule, images: torch.Tensor, rounded: Callable[[str], bool]) -> tuple[torch.Tensor, ...]:
    outputs = _Rounding(graph, rounded).run(images)
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Rounding(fx.Interpreter):
    """Runs the graph; weights and results of the modules that are `rounded` are made float16, products are not."""

    def __init__(self, graph: fx.GraphModule, rounded: Callable[[str], bool]) -> None:
        super().__init__(graph)
        self.rounded = rounded

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr":
            path = str(n.target).rpartition(".")[0]
        elif n.op == "call_function":
            path = module_stack(n)[-1]
        else:
            return result
        if self.rounded(path) and isinstance(result, torch.Tensor) and result.is_floating_point():
            return result.half().float()
        return result
