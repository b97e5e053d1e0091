"""Tokens channels first, (B, C, 1, N), as Apple's Neural Engine wants them. Exact: no sum is taken in another way.

The engine pads a last axis to 64 bytes, so that a norm of every token, (B, N, H, 1), takes 32 times its size; it knows a
Linear as a convolution of 1 x 1; and it copies where the last axis moves. In a network of maps and tokens every
transposition is between channels and tokens: none is written, only noted (`Laid`), and each operation is asked to work on
its input as it lies. One that cannot gets it as it was, transposed, so that every network can be exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from castling_deploy.export.channel_norm import channel_norm
from castling_deploy.export.scopes import kind

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

Shape = Sequence[int]
Order = tuple[int | None, ...]

RESHAPES = frozenset({"_unsafe_view", "reshape", "squeeze", "unsqueeze", "view"})
ELEMENTWISE = frozenset(
    {"add", "clamp", "clamp_min", "div", "gelu", "hardsigmoid", "hardswish", "mul", "relu", "sigmoid", "silu", "sub"}
)
REDUCTIONS = {"linalg_vector_norm": 2, "mean": 1, "sum": 1}  # where they are given their axes; keepdim is next
TOKENS: Order = (0, 2, None, 1)  # (B, N, C) as (B, C, 1, N)
ROWS: Order = (0, 1, 2, 3)
COLUMNS: Order = (0, 1, 3, 2)  # matrices (B, H, N, D) as (B, H, D, N)


@dataclass(frozen=True)
class Laid:
    """`node` holds a tensor of the network with its axes in another order: axis i is the tensor's axis `order[i]`, or
    one of 1 that the tensor has not (None)."""

    node: Node
    order: Order

    @property
    def shape(self) -> Shape:
        return shape_of(self.node)

    @property
    def plain(self) -> bool:
        """Whether it lies as the network has it."""
        return self.order == tuple(range(len(self.order)))

    def axis(self, of_network: int) -> int:
        """Where an axis of the tensor lies."""
        return self.order.index(of_network % len(self.axes))

    @property
    def axes(self) -> list[int]:
        """The tensor's axes as they lie, without those of 1 that were put in."""
        return [axis for axis in self.order if axis is not None]


def shape_of(node: Node) -> Shape:
    return tuple(node.meta["val"].shape)


def channels_first(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` (ATen dialect) with its tokens as (B, C, 1, N) from the first transposition on. Changes it in place."""
    rewriting = _Rewriting(program)
    for node in list(program.graph.nodes):
        rewriting.take(node)
    (output,) = program.graph.find_nodes(op="output")
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        spec.arg.name = node.name
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


class _Rewriting:
    """The graph so far: each of its tensors as it lies now."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        import torch

        self.aten, self.graph = torch.ops.aten, program.graph
        self.laid: dict[Node, Laid] = {}
        self.here = next(iter(self.graph.nodes))  # where operations are put in, and whose module they are from
        self.forms: dict[str, Callable[[Node, Laid], Laid | None]] = {
            **dict.fromkeys(RESHAPES, self._reshape),
            **dict.fromkeys(ELEMENTWISE, self._elementwise),
            **dict.fromkeys(REDUCTIONS, self._reduce),
            "cat": self._cat,
            "clone": lambda node, x: x,
            "conv2d": self._conv,
            "layer_norm": self._layer_norm,
            "linear": self._linear,
            "matmul": self._matmul,
            "pad": self._pad,
            "permute": self._permute,
            "slice": self._along_axis,
            "softmax": self._along_axis,
            "transpose": self._permute,
        }

    def take(self, node: Node) -> None:
        """Lets `node` work on its inputs as they lie, or gives them to it as they were."""
        self.here = node
        form = self.forms.get(kind(node)) if node.op == "call_function" else None
        given = [self._of(one) for one in node.all_input_nodes]
        moves = form == self._permute or any(not one.plain for one in given)
        found = form(node, given[0]) if form and moves else None
        if found is None:
            for one in node.all_input_nodes:
                if one in self.laid:
                    node.replace_input_with(one, self._as_it_was(self._of(one)))
            if kind(node) in RESHAPES and any(not one.plain for one in given):
                node.target = self.aten.reshape.default  # a view takes no tensor that was transposed
                node.args = (node.args[0], list(shape_of(node)))
        else:
            self.laid[node] = found

    def _of(self, node: Node) -> Laid:
        value = node.meta.get("val")
        return self.laid.get(node) or Laid(node, tuple(range(value.dim() if hasattr(value, "dim") else 0)))

    def _put(self, operation: Any, *args: Any) -> Node:
        from torch.fx.node import map_arg

        with self.graph.inserting_before(self.here):
            node = self.graph.call_function(operation, args)
        node.meta = {**self.here.meta, "val": operation(*map_arg(args, lambda one: one.meta["val"]))}
        return node

    def _shaped(self, node: Node, shape: Shape) -> Node:
        """`node` in another shape: of several reshapes in a row, one."""
        while node.op == "call_function" and kind(node) in RESHAPES:
            node = node.args[0]  # type: ignore[assignment]
        return node if tuple(shape) == shape_of(node) else self._put(self.aten.reshape.default, node, list(shape))

    def _as_it_was(self, x: Laid) -> Node:
        return self._permuted(x, tuple(range(len(x.axes))))

    def _permuted(self, x: Laid, order: Order) -> Node:
        """The tensor in this order, which has no axes put in: a transposition, where more than axes of 1 move."""
        sizes = {axis: size for axis, size in zip(x.order, x.shape, strict=True) if axis is not None}
        shape = [sizes[axis] for axis in order if axis is not None]
        moving = [[axis for axis in one if axis is not None and sizes[axis] > 1] for one in (x.order, order)]
        if moving[0] == moving[1]:
            return self._shaped(x.node, shape)
        bare = self._shaped(x.node, [sizes[axis] for axis in x.axes])
        return self._put(self.aten.permute.default, bare, [x.axes.index(axis) for axis in order if axis is not None])

    def _laid_out(self, node: Node, axes: Sequence[int], shape: Shape) -> Laid:
        """A tensor of the network of this shape, held by `node` with its axes in the order `axes`.

        Three axes get a fourth, which convolutions ask for. A last axis of 1, where the class token alone is asked, is
        no good: there the tensor lies as it was, which moves nothing.
        """
        order: Order = tuple(axes)
        if order == TOKENS[:2] + TOKENS[3:]:
            order = TOKENS
        x = Laid(self._shaped(node, [1 if axis is None else shape[axis] for axis in order]), order)
        wide = [axis for axis in axes if shape[axis] > 1]
        if x.shape[-1] == 1 and wide == sorted(wide):
            return Laid(self._shaped(node, shape), tuple(range(len(shape))))
        return x

    # -- operations that compute nothing

    def _permute(self, node: Node, x: Laid) -> Laid | None:
        shape = shape_of(node)
        if kind(node) == "permute":
            permutation = [axis % len(shape) for axis in node.args[1]]  # type: ignore[union-attr, operator]
        else:
            permutation = list(range(len(shape)))
            one, other = (axis % len(shape) for axis in node.args[1:3])  # type: ignore[operator]
            permutation[one], permutation[other] = other, one
        return self._laid_out(x.node, [permutation.index(axis) for axis in x.axes], shape)

    def _reshape(self, node: Node, x: Laid) -> Laid | None:
        before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
        axes: list[int] = []
        groups = {old[0]: (old, new) for old, new in grouped(before, after)}
        places = iter(x.axes)
        for axis in places:
            if axis not in groups:
                return None
            old, new = groups[axis]
            if [axis, *(next(places, -1) for _ in old[1:])] != old:  # they do not lie side by side
                return None
            axes += new
        return self._laid_out(x.node, axes, after)

    # -- operations that work on any axes

    def _elementwise(self, node: Node, _: Laid) -> Laid | None:
        rank = len(shape_of(node))
        operands = [self._of(one) for one in node.all_input_nodes]
        (first, *_) = (one for one in operands if not one.plain)
        if len(first.axes) != rank:
            return None
        placed = {one: self._beside(self._of(one), first, rank) for one in node.all_input_nodes}
        return Laid(self._again(node, placed), first.order)

    def _beside(self, x: Laid, first: Laid, rank: int) -> Node:
        """`x` as `first` lies, to be broadcast against it: a constant is transposed before the program runs."""
        if x.order == first.order:
            return x.node
        node = self._as_it_was(x)
        shape = [1] * (rank - len(shape_of(node))) + list(shape_of(node))
        turned = self._permuted(Laid(self._shaped(node, shape), tuple(range(rank))), tuple(first.axes))
        return self._shaped(turned, [1 if axis is None else shape[axis] for axis in first.order])

    def _again(self, node: Node, placed: dict[Node, Node]) -> Node:
        """The operation of `node` with other inputs."""
        with self.graph.inserting_before(self.here):
            made = self.graph.node_copy(node, placed.__getitem__)
        values = [one.meta["val"] if hasattr(one, "meta") else one for one in made.args]
        made.meta = {**node.meta, "val": node.target(*values, **made.kwargs)}  # type: ignore[operator]
        return made

    def _along_axis(self, node: Node, x: Laid) -> Laid:
        """slice and softmax, whose first argument is their axis."""
        _, axis, *others = (*node.args, 0)[: max(2, len(node.args))]
        made = self._put(node.target, x.node, x.axis(axis), *others)  # type: ignore[arg-type]
        return Laid(made, x.order) if x.order == TOKENS and shape_of(made)[-1] > 1 else self._laid_out(
            made, x.axes, shape_of(node)
        )

    def _pad(self, node: Node, x: Laid) -> Laid:
        """Pads come in pairs from the last axis on."""
        _, pads, *others = node.args
        rank, pairs = len(x.axes), list(zip(pads[::2], pads[1::2], strict=True))  # type: ignore[index]
        amounts = {rank - 1 - place: pair for place, pair in enumerate(pairs)}
        lying = [amounts.get(axis, (0, 0)) if axis is not None else (0, 0) for axis in reversed(x.order)]
        return Laid(self._put(node.target, x.node, [amount for pair in lying for amount in pair], *others), x.order)

    def _cat(self, node: Node, x: Laid) -> Laid | None:
        tensors, axis, *_ = (*node.args, 0)
        given = [self._of(one) for one in tensors]  # type: ignore[union-attr, arg-type]
        if any(one.order != x.order for one in given):
            return None
        return Laid(self._put(node.target, [one.node for one in given], x.axis(axis)), x.order)  # type: ignore[arg-type]

    def _reduce(self, node: Node, x: Laid) -> Laid | None:
        place = REDUCTIONS[kind(node)]
        if len(node.args) <= place or node.args[place] is None or node.kwargs:
            return None
        reduced = [axis % len(x.axes) for axis in node.args[place]]  # type: ignore[union-attr, operator]
        over, keepdim = [x.axis(axis) for axis in reduced], (*node.args, False)[place + 1]
        before = (x.node, *node.args[1:place])
        if keepdim:
            return Laid(self._put(node.target, *before, over, True), x.order)
        over += [axis for axis, of_network in enumerate(x.order) if of_network is None]
        left = [axis for axis in x.axes if axis not in reduced]
        made = self._put(node.target, *before, over, False)
        return self._laid_out(made, [sorted(left).index(axis) for axis in left], shape_of(node))

    # -- operations of channels and tokens

    def _linear(self, node: Node, x: Laid) -> Laid | None:
        """A Linear as a convolution of 1 x 1, where channels lie behind the batch."""
        _, weight, *bias = node.args
        if len(x.order) != len(ROWS) or x.axis(-1) != 1:
            return None
        return Laid(self._put(self.aten.conv2d.default, x.node, self._as_kernel(weight), *bias), x.order)

    def _as_kernel(self, weight: Any) -> Node:
        """(O, I) -> (O, I, 1, 1); of weights in 8 bits their levels or indices, for a format keeps these as they are."""
        if weight.op == "call_function":
            levels, *others = weight.args
            return self._put(weight.target, self._as_kernel(levels), *others)
        return self._put(self.aten.reshape.default, weight, [*shape_of(weight), 1, 1])

    def _conv(self, node: Node, x: Laid) -> Laid | None:
        """A convolution of matrices (B, H, N, D) that lie as (B, H, D, N): its kernel lies down, (9, 1) becomes (1, 9).

        Apple's rules would rather have it along the height. Tokens there have a last axis of 1, or of channels, which
        takes a transposition on either side; the products before and behind have their tokens last.
        """
        if x.order != COLUMNS:
            return None
        _, weight, bias, *others = (*node.args, None)[: max(3, len(node.args))]
        turned = self._put(self.aten.transpose.int, weight, 2, 3)
        swapped = [pair[::-1] if isinstance(pair, Sequence) and len(pair) == 2 else pair for pair in others]
        return Laid(self._put(node.target, x.node, turned, bias, *swapped), x.order)

    def _layer_norm(self, node: Node, x: Laid) -> Laid | None:
        """Over the channels behind the batch, or of every head as an image of the batch."""
        _, sizes, weight, bias, eps, *_ = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])
        place = x.axis(-1)
        if len(sizes) != 1 or place == len(x.order) - 1:  # type: ignore[arg-type]
            return None
        shape = [math.prod(x.shape[:place]), x.shape[place], 1, math.prod(x.shape[place + 1 :])]
        made = self._put(channel_norm(), self._shaped(x.node, shape), eps)
        for operation, affine in ((self.aten.mul.Tensor, weight), (self.aten.add.Tensor, bias)):
            if affine is not None:
                made = self._put(operation, made, self._shaped(affine, [shape[1], 1, 1]))  # type: ignore[arg-type]
        return Laid(self._shaped(made, x.shape), x.order)

    def _matmul(self, node: Node, x: Laid) -> Laid | None:
        """A B, or its transposed B' A' where the rows of A, the tokens, lie last: nothing is moved, products take their
        matrices transposed."""
        a, b = x, self._of(node.args[1])  # type: ignore[arg-type]
        if any(one.order not in (ROWS, COLUMNS) for one in (a, b)):
            return None
        turned = self._put(self.aten.transpose.int, b.node, -2, -1) if a.plain != b.plain else b.node
        factors = (a.node, turned) if a.plain else (turned, a.node)
        return Laid(self._put(node.target, *factors), a.order)


def grouped(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of two shapes of one tensor that hold the same numbers, in the fewest on both sides."""
    old, new = [0], [0]
    while old[-1] < len(before) and new[-1] < len(after):
        sizes = math.prod(before[axis] for axis in old), math.prod(after[axis] for axis in new)
        if sizes[0] < sizes[1]:
            old.append(old[-1] + 1)
        elif sizes[0] > sizes[1]:
            new.append(new[-1] + 1)
        else:
            if old[-1] + 1 == len(before) or new[-1] + 1 == len(after):  # axes of 1 may be left
                old += range(old[-1] + 1, len(before))
                new += range(new[-1] + 1, len(after))
            yield old, new
            old, new = [old[-1] + 1], [new[-1] + 1]
