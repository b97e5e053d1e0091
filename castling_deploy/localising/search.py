"""The first wrong value of a network, by bisection: from blocks down to operators. It exports nothing, it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from castling_deploy.localising.prefix import Traced


class Search:
    """A search among the values of `traced`.

    `judge` says whether the value of a node is wrong, None where that cannot be told. What is `right` is learned on the
    way, and is not asked for again.
    """

    def __init__(self, traced: Traced, judge: Callable[[fx.Node], bool | None], step: Callable[[], None]) -> None:
        self._traced, self._judge, self._step = traced, judge, step
        self.right: set[fx.Node] = set()
        self._undecided: set[fx.Node] = set()

    def first(self, end: fx.Node, suspects: Sequence[fx.Node] = ()) -> fx.Node:
        """The first wrong node on the way to `end`, which is wrong: none of the values it is computed from is.

        `suspects` are asked for before others.
        """
        high = self._guessed(end, suspects)
        path = ""
        while True:
            children = self._traced.children(path)
            high = self._narrowed(high, children.values())
            own = [node for node in self._traced.inside(path) if self._traced.exportable(node)]
            within = {node for child in children for node in self._traced.inside(child)}
            high = self._narrowed(high, [node for node in own if node not in within])
            self._step()
            owner = [child for child in children if high in self._traced.inside(child)]
            if not owner:
                return high
            path = owner[0]

    def last_right(self, node: fx.Node) -> fx.Node | None:
        """The last value that `node` is computed from and that was found right."""
        right = self.right & self._traced.ancestors(node)
        return max(right, key=self._traced.order.__getitem__, default=None)

    def _guessed(self, end: fx.Node, suspects: Sequence[fx.Node]) -> fx.Node:
        """The first suspect that is wrong, or `end`; what comes before it is judged too. A suspect that is right is not
        held against the others: the target may compute it in float32, or fold one weight into another."""
        for node in suspects:
            wrong = self._judge(node)
            if wrong is False:
                self.right.add(node)
            if wrong:
                for before in self._inputs(node):
                    if before not in self.right and self._judge(before) is False:
                        self.right.add(before)
                return node
        return end

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nearest values that `node` is computed from and that a prefix can end with."""
        found: dict[fx.Node, None] = {}
        waiting = list(node.all_input_nodes)
        while waiting:
            one = waiting.pop(0)
            if self._traced.exportable(one):
                found[one] = None
            else:
                waiting.extend(one.all_input_nodes)
        return list(found)

    def _narrowed(self, high: fx.Node, candidates: Iterable[fx.Node]) -> fx.Node:
        """`high`, or the first of the candidates on the way to it that is wrong. What is computed on the way to a right
        value counts as right: an error that a later norm hides is not the one that is looked for."""
        ordered = sorted(set(candidates), key=self._traced.order.__getitem__)
        while True:
            covered = set().union(*(self._traced.ancestors(node) for node in self.right)) | self.right
            way = self._traced.ancestors(high)
            left = [node for node in ordered if node in way and node not in covered and node not in self._undecided]
            if not left:
                return high
            middle = left[len(left) // 2]
            wrong = self._judge(middle)
            if wrong is None:
                self._undecided.add(middle)
            elif wrong:
                high = middle
            else:
                self.right.add(middle)
