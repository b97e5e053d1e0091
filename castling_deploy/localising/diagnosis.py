"""What the numbers around a fault say of its cause. Honest guesses: a cause is likely, never proven."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from castling_deploy.localising.prefix import Traced, operator
from castling_deploy.parity import TOLERANCES, Array, Reference
from castling_deploy.target import Precision

LARGEST_HALF = 65504.0  # of float16; the next larger number is infinity
DOMINANT = 0.25  # share of the limit that rounding alone has to take before cancellation is named
GRADUAL = 0.5  # share of the error that was there before, from which on no one module is to blame

# Operators that add up terms, whose magnitudes the same operator tells when it is given absolute values.
SUMS = frozenset(
    {"add", "addmm", "bmm", "conv1d", "conv2d", "convolution", "linear", "matmul", "mean", "mm", "sub", "sum"}
)
SQUARES = frozenset({"linalg_vector_norm", "norm"})


class Cause(StrEnum):
    """Why an artefact goes wrong, as far as numbers tell."""

    OVERFLOW = "overflow"
    CANCELLATION = "cancellation"
    ROUNDING = "accumulated rounding"
    UNSUPPORTED = "unsupported operator"
    WEIGHTS = "wrong weights"
    FILE = "edited file"
    OPERATOR = "wrong operator"


@dataclass(frozen=True)
class Statistics:
    """One value on the probes. `max_abs` and `spread` are of the finite numbers; `over_half` is the share of numbers
    beyond float16's 65504, infinities among them."""

    shape: tuple[int, ...]
    max_abs: float
    nonfinite: float
    over_half: float
    spread: float

    @staticmethod
    def of(values: Array, real: int) -> Statistics:
        """Of (P, ...), the first `real` of them for real images."""
        finite = values[np.isfinite(values)].astype(np.float64)
        size = max(1, values.size)
        return Statistics(
            tuple(values.shape[1:]),
            float(np.abs(finite).max(initial=0.0)),
            1 - finite.size / size,
            float(((np.abs(finite) > LARGEST_HALF).sum() + size - finite.size) / size),
            Reference(np.nan_to_num(values, posinf=0.0, neginf=0.0), real, noise=0.0).spread,
        )


class _Watching(fx.Interpreter):
    """Runs a graph and keeps the largest magnitude of every node, and the values of some."""

    def __init__(self, traced: Traced, keep: Iterable[fx.Node]) -> None:
        super().__init__(traced.graph_module)
        self.largest: dict[fx.Node, float] = {}
        self.keep, self.kept = set(keep), dict[fx.Node, list[Any]]()
        self.terms: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point() and n.op == "call_function":
            peak = float(result.abs().max()) if result.numel() else 0.0
            if operator(n) in SQUARES:
                peak = max(peak, peak * peak)  # the squares are added up inside
            self.largest[n] = max(self.largest.get(n, 0.0), peak)
            if n in self.keep and operator(n) in SUMS:
                arguments, keywords = self.fetch_args_kwargs_from_env(n)
                terms = self._of_magnitudes(n, arguments, keywords)
                self.terms[n] = max(self.terms.get(n, 0.0), float(terms.abs().max()))
        if n in self.keep:
            self.kept.setdefault(n, []).append(result)
        return result

    def _of_magnitudes(self, node: fx.Node, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> torch.Tensor:
        target: Any = torch.ops.aten.add.Tensor if operator(node) == "sub" else node.target
        magnitudes = [one.abs() if isinstance(one, torch.Tensor) else one for one in arguments]
        return target(*magnitudes, **keywords)


@dataclass(frozen=True)
class Watched:
    """The float32 network on the probes: `largest` magnitude by node (the sum of squares for a norm), `kept` values
    (P, ...), and for kept sums the largest sum of the magnitudes of their `terms`."""

    largest: Mapping[fx.Node, float]
    kept: Mapping[fx.Node, Array]
    terms: Mapping[fx.Node, float]


@torch.no_grad()
def watch(traced: Traced, inputs: Array, keep: Iterable[fx.Node] = ()) -> Watched:
    """Run `traced` on (P, C, H, W)."""
    watching = _Watching(traced, keep)
    for batch in batches(inputs, traced.network.inputs[0].shape[0]):
        watching.run(torch.from_numpy(batch), enable_io_processing=False)
    kept = {node: torch.cat(parts).numpy()[: len(inputs)] for node, parts in watching.kept.items()}
    return Watched(watching.largest, kept, watching.terms)


def batches(inputs: Array, size: int) -> list[Array]:
    """`inputs` in batches of `size`, the last one filled up with the last input."""
    missing = -len(inputs) % size
    full = np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)]) if missing else inputs
    return [np.ascontiguousarray(full[start : start + size]) for start in range(0, len(full), size)]


def likely(
    precision: Precision,
    reference: Statistics,
    actual: Statistics | None,
    *,
    rel: float | None,
    rel_before: float | None,
    largest_inside: float,
    terms: float | None,
    missing_weights: Sequence[str] | None,
) -> tuple[Cause, str]:
    """The likely cause, and the numbers that speak for it, in a sentence.

    `largest_inside` is the largest magnitude on the way from the last good value; `terms` the largest sum of magnitudes
    that the operator adds up; `missing_weights` those of the module that the artefact does not hold, None where it
    cannot be read.
    """
    tolerance = TOLERANCES[precision]
    if precision is Precision.FP16 and max(reference.max_abs, largest_inside) > LARGEST_HALF:
        return Cause.OVERFLOW, (
            f"in float32 the numbers here reach {max(reference.max_abs, largest_inside):.3g}, and float16 ends at 65504"
            + (f"; {_share(actual.nonfinite)} of the artefact's are infinite or NaN" if actual else "")
        )
    if actual is not None and actual.nonfinite > 0:
        return Cause.OVERFLOW, (
            f"{_share(actual.nonfinite)} of the artefact's numbers are infinite or NaN where PyTorch's reach "
            f"{reference.max_abs:.3g}: an intermediate result inside the operator overflows, or is 0 / 0"
        )
    if missing_weights:
        return Cause.WEIGHTS, f"the artefact does not hold the numbers of {', '.join(missing_weights[:3])}"
    if rel is not None and rel_before is not None and rel_before > GRADUAL * rel:
        return Cause.ROUNDING, (
            f"the error was {rel_before:.2g} of the spread before and is {rel:.2g} here: it grows from module to module"
        )
    if terms is not None and reference.spread > 0:
        noise = terms * tolerance.epsilon / 2 / reference.spread
        if noise > DOMINANT * tolerance.limit:
            return Cause.CANCELLATION, (
                f"terms of up to {terms:.3g} add up to results that differ by {reference.spread:.3g} from image to "
                f"image: rounding the terms alone makes an error of {noise:.2g} of that"
            )
    read = "" if missing_weights is None else ", and the artefact holds this module's weights as they are"
    return Cause.OPERATOR, (
        f"all numbers are finite and within range{read}: the artefact computes something else here; "
        "a converter's or a runtime's fault, or a constant it changed"
    )


def absent(parameters: Mapping[str, Array], constants: Iterable[npt.NDArray[np.generic]]) -> tuple[str, ...]:
    """Names of `parameters` whose numbers no constant holds, in whatever order and shape, rounded to float16 or not."""
    held: dict[int, list[npt.NDArray[np.generic]]] = {}
    for constant in constants:
        if constant.dtype.kind == "f":
            held.setdefault(constant.size, []).append(np.sort(constant, axis=None))
    found = []
    for name, values in parameters.items():
        wanted = np.sort(values, axis=None)
        if not any(np.array_equal(one, wanted.astype(one.dtype)) for one in held.get(values.size, ())):
            found.append(name)
    return tuple(found)


def _share(share: float) -> str:
    return f"{100 * share:.2g} %"
