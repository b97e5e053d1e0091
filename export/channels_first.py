"""Tokens channels first, (B, C, 1, N), as Apple's Neural Engine wants them. Exact: no sum is taken in another way.

The engine pads a last axis to 64 bytes, so that a norm of every token, (B, N, H, 1), takes 32 times its size; it knows
a Linear as a convolution of 1 x 1; and it copies where the last axis moves. In a network of maps and tokens every
transposition is between channels and tokens: none is written, only noted (`Laid`), and each operation works on its
input as it lies. One that cannot gets it as it was, transposed, so that every network can be exported.

At 224 pixels, by the rules in `neural_engine`: 54 of Castling-LeViT-128S's 410 operations are unfit, and 45 are
transpositions; here none of 365, and none. Castling-DeiT-T: 72 of 422, and 49; here 8 of 378 (the class token's), and
none. Core AI's products take no matrix transposed: one transposition of an attention stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from castling_deploy.errors import UsageError
from castling_deploy.export.channel_norm import channel_norm
from castling_deploy.export.scopes import kind

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

Layout = Literal["channels-last", "channels-first"]  # of tokens inside: (B, N, C), or (B, C, 1, N)
LAYOUTS = get_args(Layout)

Shape = Sequence[int]
Order = tuple[int | None, ...]

RESHAPES = frozenset({"_unsafe_view", "reshape", "squeeze", "unsqueeze", "view"})
ELEMENTWISE = frozenset(
    {"add", "clamp", "clamp_min", "div", "gelu", "hardsigmoid", "hardswish", "mul", "relu", "sigmoid", "silu", "sub"}
)
REDUCTIONS = {"linalg_vector_norm": 2, "mean": 1, "sum": 1}  # where they are given their axes; keepdim is next
COMPRESSED = frozenset({"dequantize_per_channel", "look_up"})  # what makes a weight of levels or indices
TOKENS: Order = (0, 2, None, 1)  # (B, N, C) as (B, C, 1, N)
ROWS: Order = (0, 1, 2, 3)
COLUMNS: Order = (0, 1, 3, 2)  # matrices (B, H, N, D) as (B, H, D, N)


def require_layout(layout: str) -> None:
    """Raises UsageError for one that there is not."""
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout '{layout}'", hint=f"use one of: {', '.join(LAYOUTS)}")


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
        """Whether it lies as in the network."""
        return self.order == tuple(range(len(self.order)))

    @property
    def axes(self) -> list[int]:
        """The tensor's own axes as they lie."""
        return [axis for axis in self.order if axis is not None]

    def place(self, axis: int) -> int:
        """Where an axis of the tensor lies."""
        return self.order.index(axis % len(self.axes))


def shape_of(node: Node) -> Shape:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def in_channels_first(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
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
        # what an operation becomes, of its first tensor as it lies and its own arguments; None: it cannot
        self.forms: dict[str, Callable[[Node, Laid, tuple[Any, ...]], Laid | None]] = {
            **dict.fromkeys(RESHAPES, self._reshape),
            **dict.fromkeys(ELEMENTWISE, self._elementwise),
            **dict.fromkeys(REDUCTIONS, self._reduce),
            "_to_copy": self._cast,
            "cat": self._cat,
            "clone": lambda node, x, args: x,
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
        given = [self._of(one) for one in node.all_input_nodes]
        form = self.forms.get(kind(node)) if node.op == "call_function" else None
        moves = form == self._permute or not all(one.plain for one in given)
        found = form(node, given[0], node.args) if form and moves else None
        if found is not None:
            self.laid[node] = found
            return
        for one in node.all_input_nodes:
            node.replace_input_with(one, self._as_it_was(self._of(one)))
        if kind(node) in RESHAPES and moves:  # a view takes no tensor that was transposed
            node.target, node.args = self.aten.reshape.default, (node.args[0], list(shape_of(node)))

    def _of(self, node: Node) -> Laid:
        if node not in self.laid:
            self.laid[node] = Laid(node, tuple(range(len(shape_of(node)))))
        return self.laid[node]

    def _put(self, operation: Any, *args: Any, **options: Any) -> Node:
        from torch.fx.node import map_arg

        with self.graph.inserting_before(self.here):
            node = self.graph.call_function(operation, args, options)
        node.meta = {**self.here.meta, "val": operation(*map_arg(args, lambda one: one.meta["val"]), **options)}
        return node

    def _shaped(self, node: Node, shape: Shape) -> Node:
        """`node` in another shape: of several reshapes in a row, one."""
        while tuple(shape) != shape_of(node) and node.op == "call_function" and kind(node) in RESHAPES:
            node = node.all_input_nodes[0]
        return node if tuple(shape) == shape_of(node) else self._put(self.aten.reshape.default, node, list(shape))

    def _as_it_was(self, x: Laid) -> Node:
        return self._permuted(x, sorted(x.axes))

    def _permuted(self, x: Laid, axes: Sequence[int]) -> Node:
        """The tensor with its own axes in this order: a transposition, where more than axes of 1 move."""
        sizes = {axis: size for axis, size in zip(x.order, x.shape, strict=True) if axis is not None}
        if [axis for axis in x.axes if sizes[axis] > 1] == [axis for axis in axes if sizes[axis] > 1]:
            return self._shaped(x.node, [sizes[axis] for axis in axes])
        bare = self._shaped(x.node, [sizes[axis] for axis in x.axes])
        return self._put(self.aten.permute.default, bare, [x.axes.index(axis) for axis in axes])

    def _laid_out(self, node: Node, axes: Sequence[int], shape: Shape) -> Laid:
        """A tensor of the network of this shape, whose numbers `node` holds with its axes in the order `axes`.

        Tokens get the axis of 1 that convolutions ask for. One token alone, the class token, lies as it was: that moves
        nothing, and its last axis is not 1.
        """
        order = TOKENS if tuple(axes) == (0, 2, 1) else tuple(axes)
        wide = [axis for axis in axes if shape[axis] > 1]
        if wide == sorted(wide) and shape[-1] > 1:
            order = tuple(range(len(shape)))
        return Laid(self._shaped(node, [1 if axis is None else shape[axis] for axis in order]), order)

    # -- operations that compute nothing

    def _permute(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        rank = len(x.axes)
        order = list(range(rank))
        if kind(node) == "permute":
            order = [axis % rank for axis in args[1]]
        else:
            one, other = (axis % rank for axis in args[1:])
            order[one], order[other] = other, one
        return self._laid_out(x.node, [order.index(axis) for axis in x.axes], shape_of(node))

    def _reshape(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """Axes are split where they lie, and joined where they lie side by side."""
        groups = {old[0]: (old, new) for old, new in grouped(shape_of(args[0]), shape_of(node))}
        axes: list[int] = []
        places = iter(x.axes)
        for axis in places:
            old, new = groups.get(axis, ([], []))
            if [axis, *(next(places, None) for _ in old[1:])] != old:
                return None
            axes += new
        return self._laid_out(x.node, axes, shape_of(node))

    # -- operations that work on any axes

    def _elementwise(self, node: Node, _: Laid, args: tuple[Any, ...]) -> Laid | None:
        from torch.fx.node import map_arg

        first = next(one for one in map(self._of, node.all_input_nodes) if not one.plain)
        if len(first.axes) != len(shape_of(node)):
            return None
        made = self._put(node.target, *map_arg(args, lambda one: self._beside(self._of(one), first)), **node.kwargs)
        return Laid(made, first.order)

    def _cast(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """What goes out is as it was before it becomes float32."""
        return None if any(user.op == "output" for user in node.users) else self._elementwise(node, x, args)

    def _beside(self, x: Laid, first: Laid) -> Node:
        """`x` as `first` lies, to be broadcast against it: a constant is transposed before the program runs."""
        if x.order == first.order:
            return x.node
        node, rank = self._as_it_was(x), len(first.axes)
        shape = [*[1] * (rank - len(shape_of(node))), *shape_of(node)]
        turned = self._permuted(Laid(self._shaped(node, shape), tuple(range(rank))), first.axes)
        return self._shaped(turned, [1 if axis is None else shape[axis] for axis in first.order])

    def _along_axis(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid:
        axis, *others = args[1:] or (0,)
        return self._laid_out(self._put(node.target, x.node, x.place(axis), *others), x.axes, shape_of(node))

    def _cat(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        tensors, axis, *_ = (*args, 0)
        given = [self._of(one) for one in tensors]
        if any(one.order != x.order for one in given):
            return None
        return Laid(self._put(node.target, [one.node for one in given], x.place(axis)), x.order)

    def _pad(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """Pads are pairs, the last axis's first."""
        _, pads, *others = args
        if others[:1] not in ([], ["constant"]):
            return None
        pairs = dict(zip(sorted(x.axes, reverse=True), zip(pads[::2], pads[1::2], strict=True), strict=False))
        lying = [amount for axis in reversed(x.order) for amount in pairs.get(-1 if axis is None else axis, (0, 0))]
        return Laid(self._put(node.target, x.node, lying, *others), x.order)

    def _reduce(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        at = REDUCTIONS[kind(node)]
        over, keepdim = (*args[at:], None, None)[:2]
        if over is None or node.kwargs:
            return None
        places, axes = [x.place(axis) for axis in over], x.axes
        if not keepdim:
            left = [axis for place, axis in enumerate(x.order) if axis is not None and place not in places]
            axes = [sorted(left).index(axis) for axis in left]
            places += [place for place, axis in enumerate(x.order) if axis is None]
        made = self._put(node.target, x.node, *args[1:at], places, bool(keepdim))
        return self._laid_out(made, axes, shape_of(node))

    # -- operations of channels and tokens

    def _linear(self, _: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """A convolution of 1 x 1, where channels lie behind the batch."""
        if len(x.order) != len(ROWS) or x.place(-1) != 1:
            return None
        _, weight, *bias = args
        return Laid(self._put(self.aten.conv2d.default, x.node, self._as_kernel(weight), *bias), x.order)

    def _as_kernel(self, weight: Node) -> Node:
        """(O, I) -> (O, I, 1, 1); of a weight in few bits its levels or indices, which formats keep as they are."""
        if kind(weight) in COMPRESSED:
            levels, *others = weight.args
            return self._put(weight.target, self._as_kernel(levels), *others, **weight.kwargs)  # type: ignore[arg-type]
        return self._put(self.aten.reshape.default, weight, [*shape_of(weight), 1, 1])

    def _conv(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """Of matrices (B, H, N, D) that lie as (B, H, D, N): the kernel lies down with them, (9, 1) becomes (1, 9).

        Apple's rules would have it stand, along the height. With tokens there the last axis is 1, or D with a
        transposition on either side: the products before and behind have tokens last.
        """
        if x.order != COLUMNS:
            return None
        _, weight, *others = args
        lying = [pair[::-1] if isinstance(pair, (list, tuple)) and len(pair) == 2 else pair for pair in others]
        return Laid(self._put(node.target, x.node, self._put(self.aten.transpose.int, weight, 2, 3), *lying), x.order)

    def _layer_norm(self, _: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """Over the channels behind the batch, or over those of every head as an image of the batch."""
        _, sizes, *affine = args
        weight, bias, eps = (*affine, *(None, None, 1e-5)[len(affine) :])[:3]
        at = x.place(-1)
        if len(sizes) != 1 or at == len(x.order) - 1:
            return None
        shape = [math.prod(x.shape[:at]), x.shape[at], 1, math.prod(x.shape[at + 1 :])]
        made = self._put(channel_norm(), self._shaped(x.node, shape), weight, bias, eps)
        return Laid(self._shaped(made, x.shape), x.order)

    def _matmul(self, node: Node, x: Laid, args: tuple[Any, ...]) -> Laid | None:
        """(A B)' = B' A', which has the rows of A, tokens, last; A B where there is one row. Nothing is moved where
        products take their matrices transposed, as Core ML's do."""
        factors = x, self._of(args[1])
        if any(one.order not in (ROWS, COLUMNS) for one in factors):
            return None
        order = ROWS if x.plain and shape_of(node)[-2] == 1 else COLUMNS
        lying = [
            one.node if one.order == order else self._put(self.aten.transpose.int, one.node, -2, -1) for one in factors
        ]
        return Laid(self._put(node.target, *(lying if order == ROWS else reversed(lying))), order)


def grouped(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of two shapes of one tensor that hold the same numbers, as few as can be on both sides."""
    old, new = [0], [0]
    while old[-1] < len(before) and new[-1] < len(after):
        sizes = math.prod(before[axis] for axis in old), math.prod(after[axis] for axis in new)
        if sizes[0] < sizes[1]:
            old.append(old[-1] + 1)
        elif sizes[0] > sizes[1]:
            new.append(new[-1] + 1)
        else:
            if len(before) - 1 in old or len(after) - 1 in new:  # axes of 1 may be left
                old += range(old[-1] + 1, len(before))
                new += range(new[-1] + 1, len(after))
            yield old, new
            old, new = [old[-1] + 1], [new[-1] + 1]
