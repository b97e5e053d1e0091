"""What float16 would do to a network, found out in float32 before any format is written.

The folded network runs on the probes operation by operation; every intermediate is looked at. An operation whose values
come near 65504 has to be computed in float32 together with whatever reads them: its *island*, the smallest module that
takes and returns values in range. A reduction may leave float16 although what it takes and returns does not (a sum of
squares): there the reductions of the module are enough. Every exporter keeps these in float32, besides what its own
format needs; which ones they are is decided here, from what the network does, not from its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from castling_deploy.errors import ExportError, ParityError
from castling_deploy.export.binary16 import LARGEST, LONGEST_SUM, SMALLEST_NORMAL, UNIT_ROUNDOFF, fits
from castling_deploy.export.scopes import inside, kind, module_stack
from castling_deploy.half_profile import LIMIT, Profile, profile
from castling_deploy.parity import Reference
from castling_deploy.probes import Probes

IMAGES = 8  # real ones; the structured and the extreme ones are all looked at
BATCH = 8
MARGIN = 2.0  # an image that is not among the probes may reach twice as far
SAFE_EPS = SMALLEST_NORMAL  # a smaller one is subnormal in float16, and devices may take it for zero
LEAST_HEADROOM = 10  # operations, in the summary


@dataclass(frozen=True)
class OpRange:
    """One operation on all probes: largest |x| of its outputs, and what a float16 accumulation inside would reach.

    `accumulated` is the largest sum of squares of a norm, of magnitudes of a mean, of powers of a softmax, over
    `length` terms. `constant` is the smallest number other than zero in the operation itself (eps), `guarded` the
    smallest value that it was added to or compared with.
    """

    name: str
    path: str
    kind: str
    peak: float
    accumulated: float | None = None
    length: int | None = None
    constant: float | None = None
    guarded: float | None = None

    @property
    def reach(self) -> float:
        return max(self.peak, self.accumulated or 0.0)

    @property
    def headroom_bits(self) -> float:
        """Powers of two between the largest value and 65504; negative where it is beyond."""
        return math.log2(LARGEST / self.reach) if self.reach else math.inf

    @property
    def expected_error(self) -> float | None:
        """Relative, of a sum of `length` terms rounded one by one: 2^-11 sqrt(length). None where nothing is summed."""
        return None if self.length is None else UNIT_ROUNDOFF * math.sqrt(self.length)

    @property
    def vanishing_eps(self) -> bool:
        """Whether a device that flushes subnormals divides by next to nothing here."""
        return (
            self.constant is not None
            and self.guarded is not None
            and self.constant < SAFE_EPS
            and self.guarded < SAFE_EPS
        )

    def merged(self, other: OpRange) -> OpRange:
        """The same operation on more images."""
        return replace(
            self,
            peak=max(self.peak, other.peak),
            accumulated=None if self.accumulated is None else max(self.accumulated, other.accumulated or 0.0),
            guarded=None
            if self.guarded is None
            else min(self.guarded, self.guarded if other.guarded is None else other.guarded),
        )


@dataclass(frozen=True)
class Island:
    """A module that has to be computed in float32, or whose reductions have to, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ValueScaling:
    """Rule 17 at work: the largest square sum of the attention's last norm, and what it would be without the factor."""

    path: str
    factor: float
    square_sum: float

    @property
    def unscaled(self) -> float:
        return self.square_sum / self.factor**2

    @property
    def needed(self) -> bool:
        return self.unscaled > LARGEST


@dataclass(frozen=True)
class Audit:
    """Every operation's range, and what has to stay in float32 for it: whole modules, or their reductions alone."""

    images: int
    ops: tuple[OpRange, ...]
    islands: tuple[Island, ...]
    reductions: tuple[Island, ...]
    scalings: tuple[ValueScaling, ...]
    profile: Profile

    @property
    def least_headroom(self) -> tuple[OpRange, ...]:
        """The operations that come nearest to 65504, the nearest first."""
        return tuple(sorted(self.ops, key=lambda op: (op.headroom_bits, op.name))[:LEAST_HEADROOM])

    @property
    def unsafe_eps(self) -> tuple[OpRange, ...]:
        """Operations with a constant that is subnormal in float16, or zero."""
        return tuple(op for op in self.ops if op.constant is not None and op.constant < SAFE_EPS)

    def module_paths(self) -> tuple[str, ...]:
        """Modules to be computed in float32. Raises ParityError where that is the whole network."""
        for island in self.islands:
            if not island.path:
                raise ParityError(f"float16 cannot hold this network: {island.reason}", hint="use --precision fp32")
        return tuple(island.path for island in self.islands)

    def reduction_paths(self) -> tuple[str, ...]:
        """Modules whose reductions are to be computed in float32."""
        return tuple(island.path for island in self.reductions)


@torch.no_grad()
def audit(module: nn.Module, probes: Probes, references: Mapping[str, Reference]) -> Audit:
    """The ranges of `module` (folded, float32, eval mode) on a part of the probes, and where it loses precision.

    `references` are the outputs that its artefacts are compared with, in the order in which it returns them. Raises
    ExportError.
    """
    few = probes.few(IMAGES)
    tensors = torch.from_numpy(few.tensors)
    images = len(tensors)
    batch = min(BATCH, images)
    tensors = torch.cat([tensors, tensors[: -images % batch]])  # the graph takes whole batches
    try:
        graph = torch.export.export(module, (tensors[:batch],)).module()
    except Exception as error:  # torch.export raises errors of a dozen classes, most of them private
        raise ExportError(f"torch.export refuses the network: {error}") from error
    assert isinstance(graph, fx.GraphModule)
    observer = _Observer(graph)
    for part in tensors.split(batch):
        observer.run(part)
    ops = tuple(observer.ranges.values())
    nodes = {node.name: node for node in graph.graph.nodes}
    beyond = outermost([*_overflows(ops, nodes), *_unheld(graph, nodes.values())])
    telling = tensors[few.real - 1 :][:batch]  # a real image, then the flat ones
    profiled = profile(graph, telling, references, [island.path for island in beyond])
    islands = outermost([*beyond, *_imprecise(profiled)])
    reductions = [island for island in _reductions(ops) if not inside(island.path, [one.path for one in islands])]
    return Audit(images, ops, islands, outermost(reductions), tuple(_scalings(module, ops)), profiled)


class _Observer(fx.Interpreter):
    """Runs the graph and keeps the range of every operation that makes floating-point numbers."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.ranges: dict[str, OpRange] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        tensors = [item for item in (result if isinstance(result, (tuple, list)) else [result]) if _is_float(item)]
        if tensors:
            seen = self._observed(n, tensors)
            before = self.ranges.get(n.name)
            self.ranges[n.name] = seen if before is None else before.merged(seen)
        return result

    def _observed(self, node: fx.Node, outputs: Sequence[torch.Tensor]) -> OpRange:
        name = kind(node)
        args = self.fetch_args_kwargs_from_env(node)[0]
        seen = OpRange(
            node.name,
            module_stack(node)[-1],
            name,
            peak=max(_peak(output) for output in outputs),
            constant=min((abs(item) for item in node.args if isinstance(item, float) and item), default=None),
        )
        if name in SUMS:
            accumulated, length = SUMS[name](args, outputs[0])
            seen = replace(seen, accumulated=accumulated, length=length)
        if name in GUARDED:
            seen = replace(seen, guarded=GUARDED[name](args))
        return seen


def _peak(value: torch.Tensor) -> float:
    least, most = value.aminmax()
    return max(-float(least), float(most))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0


Sum = tuple[float, int]


def _norm_sum(args: Sequence[Any], output: torch.Tensor) -> Sum:
    return float(output.double().square().amax()), args[0].numel() // output.numel()


def _layer_norm_sum(args: Sequence[Any], output: torch.Tensor) -> Sum:
    variance, length = _variance(args)
    return float(variance.amax()) * length, length


def _mean_sum(args: Sequence[Any], output: torch.Tensor) -> Sum:
    length = args[0].numel() // output.numel()
    axes = args[1] if len(args) > 1 and args[1] else list(range(args[0].ndim))
    return float(args[0].abs().sum(axes).amax()), length


def _pool_sum(args: Sequence[Any], output: torch.Tensor) -> Sum:
    length = args[0].numel() // output.numel()
    return float(
        torch.nn.functional.adaptive_avg_pool2d(args[0].abs(), (output.shape[-2], output.shape[-1])).amax()
    ) * length, length


def _softmax_sum(args: Sequence[Any], output: torch.Tensor) -> Sum:
    return float(1 / output.amax(args[1]).amin()), output.shape[args[1]]


def _variance(args: Sequence[Any]) -> tuple[torch.Tensor, int]:
    """Of a layer_norm's input, over its normalised axes, and the number of values that it is taken of."""
    axes = tuple(range(-len(args[1]), 0))
    return args[0].double().var(axes, correction=0), math.prod(args[1])


SUMS: Mapping[str, Callable[[Sequence[Any], torch.Tensor], Sum]] = {
    "linalg_vector_norm": _norm_sum,
    "layer_norm": _layer_norm_sum,
    "mean": _mean_sum,
    "sum": _mean_sum,
    "adaptive_avg_pool2d": _pool_sum,
    "softmax": _softmax_sum,
}
GUARDED: Mapping[str, Callable[[Sequence[Any]], float]] = {
    "layer_norm": lambda args: float(_variance(args)[0].amin()),
    "clamp_min": lambda args: float(args[0].abs().amin()),
    "clamp": lambda args: float(args[0].abs().amin()),
}


def _overflows(ops: Iterable[OpRange], nodes: Mapping[str, fx.Node]) -> Iterator[Island]:
    """What makes a value out of range and what reads it, in one module."""
    for op in ops:
        if op.peak <= LARGEST / MARGIN:
            continue
        node = nodes[op.name]
        stacks = [module_stack(node), *(module_stack(user) for user in node.users)]
        yield Island(common(stacks), f"{op.kind} of {op.path or 'the network'} reaches {op.peak:.3g}")


def _unheld(graph: fx.GraphModule, nodes: Iterable[fx.Node]) -> Iterator[Island]:
    """Modules with a weight that float16 turns into something else; of vectors, one that it turns into infinity."""
    for node in nodes:
        if node.op != "get_attr" or not node.users:
            continue
        value = _attribute(graph, str(node.target))
        if not _is_float(value):
            continue
        peak = _peak(value)
        if peak > LARGEST or (value.ndim > 1 and not fits(value.detach().numpy().astype(np.float32))):
            path = common([module_stack(user) for user in node.users])
            yield Island(path, f"{node.target} has its largest entry at {peak:.3g}")


def _imprecise(profiled: Profile) -> Iterator[Island]:
    """Modules that take a large share of what the gate allows, where the whole network comes near it."""
    for share in profiled.islands:
        yield Island(
            share.path,
            f"{share.path} alone takes {share.rel:.1e} of the {LIMIT:g} that the gate allows, "
            f"the whole network {profiled.whole:.1e}",
        )


def _attribute(graph: fx.GraphModule, target: str) -> Any:
    value: Any = graph
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _reductions(ops: Iterable[OpRange]) -> Iterator[Island]:
    for op in ops:
        where = f"{op.kind} of {op.path or 'the network'}"
        if op.accumulated is not None and op.accumulated > LARGEST / MARGIN:
            yield Island(op.path, f"{where} sums up to {op.accumulated:.3g}")
        elif op.length is not None and op.length > LONGEST_SUM:
            yield Island(op.path, f"{where} sums {op.length} terms, and a float16 sum stops growing at {LONGEST_SUM}")
        elif op.vanishing_eps:
            yield Island(op.path, f"{where} adds {op.constant:.1g} to {op.guarded:.1g}: zero where it is flushed")


def common(stacks: Sequence[tuple[str, ...]]) -> str:
    """The innermost module that all are called in."""
    innermost = ""
    for paths in zip(*stacks):
        if len(set(paths)) > 1:
            break
        innermost = paths[0]
    return innermost


def outermost(islands: Sequence[Island]) -> tuple[Island, ...]:
    """One island per module, none in another; of several reasons the first."""
    first = {island.path: island for island in reversed(islands)}
    return tuple(
        island
        for path, island in sorted(first.items())
        if not inside(path, [other for other in first if other != path and inside(path, [other])])
    )


def _scalings(module: nn.Module, ops: Sequence[OpRange]) -> Iterator[ValueScaling]:
    norms = {op.path: op for op in ops if op.kind == "linalg_vector_norm"}  # the last of a module is that of the output
    for path, part in module.named_modules():
        factor = getattr(part, "value_factor", 1.0)
        if factor != 1.0 and path in norms:
            yield ValueScaling(path, factor, norms[path].accumulated or 0.0)
