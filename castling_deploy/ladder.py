"""The rungs before a toolchain enters: trained -> cast -> folded, each run and judged on the same probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from castling_deploy.castle import LayerCast, castle, measure_cast
from castling_deploy.errors import CheckpointError
from castling_deploy.fold import FoldStep, fold
from castling_deploy.parity import Array, Reference, Rung, Tolerance, Verdict, compare, top1_accuracy
from castling_deploy.probes import Probes
from castling_deploy.rewrite import copied

BATCH = 32
# Folding is exact in real arithmetic. In float64 a deep network repeats itself to about 1e-14 of the spread.
FOLD_TOLERANCE = Tolerance(1e-9, float(np.finfo(np.float64).eps))
FOLD_PROBES = 4
# What the cast may cost on labelled images before it is called harmful, in percent of the images.
CAST_MAX_DROP = 0.5


@dataclass(frozen=True)
class Ladder:
    """A trained network, its cast and its fold, with their outputs on `probes`.

    `reference` is what every artefact is compared with: the outputs of the cast network, before folding.
    """

    probes: Probes
    castled: nn.Module
    folded: nn.Module
    trained_outputs: Array
    reference: Reference
    layers: tuple[LayerCast, ...]
    steps: tuple[FoldStep, ...]
    fold_rung: Rung

    @cached_property
    def cast_rung(self) -> Rung:
        """The cast's own gap. It is an approximation: judged by accuracy where labels are known, else left open."""
        rel = self.reference.rel(self.trained_outputs, self.reference.outputs)
        verdict = Verdict.INCONCLUSIVE
        before, after = self.accuracy(self.trained_outputs), self.accuracy(self.reference.outputs)
        if before is not None and after is not None:
            verdict = Verdict.PASS if before - after <= CAST_MAX_DROP else Verdict.FAIL
        elif rel == 0:
            verdict = Verdict.PASS
        return Rung("cast", rel, None, verdict)

    def accuracy(self, outputs: Array) -> float | None:
        """Top-1 in percent on the labelled images; None without labels."""
        return top1_accuracy(outputs, self.probes.labels)


def climb(network: nn.Module, probes: Probes, advance: Callable[[float], None] = lambda share: None) -> Ladder:
    """Cast and fold `network` (training form, eval mode) and run every rung. `network` is not changed."""
    steps: list[FoldStep] = []
    castled = castle(network)
    folded = fold(castled, steps.append)
    advance(0.1)
    layers = measure_cast(network, torch.from_numpy(probes.tensors[: min(probes.real, BATCH)]))
    advance(0.2)
    trained_outputs = run(network, probes.tensors)
    advance(0.5)
    outputs = run(castled, probes.tensors)
    advance(0.8)
    if not np.isfinite(outputs).all():
        raise CheckpointError(
            "the network's own outputs are NaN or infinite on ordinary images",
            hint="the weights are damaged; nothing can be compared with such outputs",
        )
    few = probes.few(FOLD_PROBES)
    exact_castled = copied(castled).double()
    exact = run(exact_castled, few.tensors.astype(np.float64))
    noise = Reference(outputs, probes.real, noise=0.0).rel(run(castled, few.tensors), exact)
    exact_reference = Reference(exact, few.real, noise=0.0)
    step = compare(
        "logits",
        run(fold(exact_castled), few.tensors.astype(np.float64)),
        exact_reference,
        FOLD_TOLERANCE,
        exact_reference.power(FOLD_TOLERANCE),
    )
    advance(1.0)
    return Ladder(
        probes,
        castled,
        folded,
        trained_outputs,
        Reference(outputs, probes.real, noise or 0.0),
        layers,
        tuple(steps),
        Rung("fold", step.rel, FOLD_TOLERANCE.limit, step.verdict),
    )


@torch.no_grad()
def run(network: nn.Module, tensors: Array) -> Array:
    """The network on (P, C, H, W), in batches: (P, classes), in the tensors' dtype."""
    outputs = [network(batch) for batch in torch.from_numpy(tensors).split(BATCH)]
    return torch.cat(outputs).numpy()
