"""What looks guilty before anything is tried: numbers beyond float16's range, weights that the artefact lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import fx

from castling_deploy.localising.diagnosis import LARGEST_HALF, absent
from castling_deploy.localising.prefix import Traced
from castling_deploy.target import Precision, Readable, Target

GUESSES = 2  # operators that are tried before the bisection


def suspected(
    target: Target, traced: Traced, end: fx.Node, precision: Precision, largest: Mapping[fx.Node, float], folder: Path
) -> list[fx.Node]:
    """Operators on the way to `end` that are worth a try: values that float16 cannot hold, and operators with weights
    that the whole artefact, in `folder`, does not hold as they are. `largest` is the magnitude of each in float32."""
    way = sorted(traced.ancestors(end) | {end}, key=traced.order.__getitem__)
    exportable = [node for node in way if traced.exportable(node)]
    if precision is Precision.FP16:
        overflowing = [node for node in beyond_half(traced, largest) if node in exportable]
        if overflowing:
            return overflowing[:GUESSES]
    missing = missing_weights(target, traced, exportable, folder)
    return [node for node in exportable if missing and not missing.isdisjoint(_weights(node))][:GUESSES]


def beyond_half(traced: Traced, largest: Mapping[fx.Node, float]) -> list[fx.Node]:
    """Operators, in order, whose numbers float16 cannot hold and would have to."""
    beyond = [node for node, peak in largest.items() if peak > LARGEST_HALF and node not in traced.protected]
    return sorted(beyond, key=traced.order.__getitem__)


def missing_weights(target: Target, traced: Traced, nodes: Iterable[fx.Node], folder: Path) -> set[str] | None:
    """Weights that `nodes` take and the artefact in `folder` does not hold; None where it cannot be read."""
    if not isinstance(target, Readable):
        return None
    held, taken = traced.graph_module.state_dict(), set[str]().union(*map(_weights, nodes))
    parameters = {name: held[name].numpy() for name in sorted(taken) if name in held}
    return set(absent(parameters, target.constants(folder).values()))


def _weights(node: fx.Node) -> set[str]:
    """Names of the parameters and buffers that an operator takes."""
    return {str(one.target) for one in node.all_input_nodes if one.op == "get_attr"}
