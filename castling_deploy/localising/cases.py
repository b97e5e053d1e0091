"""The shortest artefacts that have the fault, with inputs and what PyTorch says of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import fx

from castling_deploy.errors import CastlingError
from castling_deploy.execution import inputs_for
from castling_deploy.localising.diagnosis import watch
from castling_deploy.localising.repro import Case
from castling_deploy.localising.trials import Trials
from castling_deploy.parity import Reference

KEPT = 4  # probes in the folder


def cases_of(trials: Trials, node: fx.Node) -> Iterator[Case]:
    """The prefix that ends with `node`, the first wrong value, and its part alone where that is wrong too."""
    ran = trials.prefix(node)
    assert ran is not None
    errors = np.abs(ran.outputs - ran.expected).reshape(len(ran.expected), -1).max(axis=1)
    kept = np.sort(np.argsort(-np.nan_to_num(errors, nan=np.inf), kind="stable")[:KEPT])  # in the order of the others
    rows = trials.rows[kept]
    given = inputs_for(ran.artifact.inputs[0], trials.probes)[rows]
    yield Case("prefix", ran.artifact, ran.folder, given, ran.expected[kept])
    alone = _alone(trials, node, rows)
    if alone is not None:
        yield alone


def _alone(trials: Trials, node: fx.Node, rows: npt.NDArray[np.int64]) -> Case | None:
    """The wrong operator, or else its module, without what comes before it, given what it is given in the network; None
    where it takes several values, cannot be exported, or is right alone."""
    traced = trials.traced
    before = traced.ancestors(node) | {node}
    module = [one for one in traced.inside(traced.place(node).module) if one in before]
    for index, chosen in enumerate(([node], module)):
        part = traced.part(chosen)
        if part is None or part.inputs == trials.network.inputs:
            continue
        source = traced.given(chosen)
        kept = watch(traced, trials.probes.tensors[rows], [source, node]).kept
        given, expected = kept[source], kept[node]
        try:
            artifact, folder, outputs = trials.part(part, given, f"alone-{index}")
        except CastlingError:
            continue
        spread = Reference(expected, len(expected), noise=0.0).spread or 1.0
        if not np.abs(outputs - expected).max() / spread <= trials.tolerance.limit:  # NaN is no pass
            return Case("alone", artifact, folder, given, expected)
    return None
