"""The rungs before a toolchain enters: trained -> cast -> folded, each run and judged on the same probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from castling_deploy.castle import LayerCast, castle, evidence_of
from castling_deploy.eight_bits import Quantisation
from castling_deploy.errors import CheckpointError
from castling_deploy.fold import FoldStep, fold
from castling_deploy.parity import (
    CAST,
    FOLD,
    FOLD_TOLERANCE,
    Array,
    Reference,
    Rung,
    Tolerance,
    Verdict,
    compare,
    worst,
)
from castling_deploy.probes import Probes
from castling_deploy.range_audit import Audit, audit
from castling_deploy.rewrite import copied
from castling_deploy.task import Outputs, Task
from castling_deploy.work import parameters, work_of

BATCH = 8  # images at once: a softmax map of MViTv2 takes 39 MB per image and head
EXACT_PROBES = 4  # that run in float64
# Multiply-accumulates of one run of a network without labelled images, as trained or in float64: 3 to 7 s on one core.
# Castling-DeiT-B takes 1.7e10 an image, Castling-MViTv2-T's detector at 416 pixels 4.6e10 as trained.
WORK = 10**11
# What the cast may cost of the task's score on labelled images, in percent, before it is called harmful.
CAST_MAX_DROP = 0.5


@dataclass(frozen=True)
class Lowered:
    """The network of an int8 artefact in PyTorch: its outputs, and what its 8 bits cost against the cast network.

    `kept` are the Linears that stay in float for the accuracy that was asked for; `ranking` holds all of them with the
    error that each makes alone, where that had to be known. `drop`, of which `max_drop` is allowed, is in points of the
    task's score; `labelled` says whether labels told it.
    """

    quantisation: Quantisation
    references: Mapping[str, Reference]
    rung: Rung
    kept: tuple[str, ...]
    ranking: tuple[tuple[str, float], ...]
    drop: float
    max_drop: float
    labelled: bool


@dataclass(frozen=True)
class Ladder:
    """A trained network, its cast and its fold, with their outputs on `probes`.

    `references` are what every artefact is compared with, output by output: the cast network's, before folding. `exact`
    are those of the folded network, float32 weights in float64 arithmetic, on `few` of the probes; `trained_outputs`
    those of the trained network, on the probes that are `telling` of the cast. Both are all that `within_work` allows.
    The trained and the cast network are not kept: beside an export of Castling-DeiT-B that were 346 MB.
    """

    task: Task
    probes: Probes
    parameters: int
    folded: nn.Module
    telling: Probes
    trained_outputs: Outputs
    references: Mapping[str, Reference]
    few: Probes
    exact: Mapping[str, Reference]
    layers: tuple[LayerCast, ...]
    steps: tuple[FoldStep, ...]
    fold_rung: Rung
    already_cast: bool
    in_8_bits: Lowered | None = None  # of an int8 artefact alone

    @property
    def outputs(self) -> Outputs:
        """The reference's outputs by name."""
        return {name: reference.outputs for name, reference in self.references.items()}

    @property
    def expected(self) -> Mapping[str, Reference]:
        """What the artefact has to compute: `references`, or those of the network in 8 bits."""
        return self.references if self.in_8_bits is None else self.in_8_bits.references

    @cached_property
    def cast_rung(self) -> Rung:
        """The cast's own gap. It is an approximation: judged by the task's score where labels are known, else open."""
        if self.already_cast:
            return Rung(CAST, None, None, Verdict.INCONCLUSIVE)
        rows = self.probes.rows(self.telling)
        rel = worst(
            reference.rel(self.trained_outputs[name], reference.outputs[rows])
            for name, reference in self.references.items()
        )
        verdict = Verdict.PASS if rel == 0 else Verdict.INCONCLUSIVE
        before, after = self.trained_score, self.reference_score
        if before is not None and after is not None:
            verdict = Verdict.PASS if before - after <= CAST_MAX_DROP else Verdict.FAIL
        return Rung(CAST, rel, None, verdict)

    @cached_property
    def range_audit(self) -> Audit:
        """What float16 would do to the folded network; found out when the first float16 artefact asks."""
        return audit(self.folded, self.probes, self.references)

    @cached_property
    def trained_score(self) -> float | None:
        """`score` of the network as trained."""
        return self.score(self.trained_outputs)

    @cached_property
    def reference_score(self) -> float | None:
        """`score` of the cast network."""
        return self.score(self.outputs)

    def with_8_bits(self, lowered: Lowered) -> Ladder:
        """The ladder of an int8 artefact. What is known of the float rungs stays known."""
        twin = replace(self, in_8_bits=lowered)
        vars(twin).update({**vars(self), "in_8_bits": lowered})  # what cached_property keeps there
        return twin

    def score(self, outputs: Outputs) -> float | None:
        """The task's metric in percent on the images whose truth is known; None without any."""
        return self.task.score(outputs, self.probes.truth, self.probes.preprocessing.size)


def climb(
    network: nn.Module,
    task: Task,
    names: Sequence[str],
    probes: Probes,
    advance: Callable[[float], None] = lambda share: None,
    *,
    already_cast: bool = False,
    told: Callable[[nn.Module, Probes], None] = lambda folded, few: None,
) -> Ladder:
    """Cast and fold `network` (training form, eval mode) and run every rung. `network` is not changed.

    `names` are those of the outputs, in the order in which the network returns them. What the cast of a network that
    is `already_cast` cost cannot be told any more. `told` hears of the folded network and of the ladder's `few` before
    anything is run.
    """
    steps: list[FoldStep] = []
    castled = castle(network)
    folded = fold(castled, steps.append)
    few = within_work(castled, probes.few(EXACT_PROBES))
    told(folded, few)
    advance(0.1)
    telling = within_work(network, probes)
    with evidence_of(network) as layers:  # the first batch is one of real images alone
        trained_outputs = run(network, names, telling.tensors, min(BATCH, telling.real))
    advance(0.4)
    outputs = run(castled, names, probes.tensors)
    advance(0.6)
    if not all(np.isfinite(values).all() for values in outputs.values()):
        raise CheckpointError(
            "the network's own outputs are NaN or infinite on ordinary images",
            hint="the weights are damaged; nothing can be compared with such outputs",
        )
    exact = in_float64(castled, names, few)
    advance(0.7)
    noiseless = {name: Reference(exact[name], few.real, noise=0.0) for name in names}
    folding = exact_rung(FOLD, noiseless, in_float64(fold(copied(castled).double()), names, few), FOLD_TOLERANCE)
    advance(0.9)
    rows, references = probes.rows(few), {}
    for name in names:
        noise = Reference(outputs[name], probes.real, noise=0.0).rel(outputs[name][rows], exact[name])
        references[name] = Reference(outputs[name], probes.real, noise or 0.0)
    del exact, noiseless  # of a segmenter 1.6 GB, and as much comes now
    handed = in_float64(folded, names, few)
    advance(1.0)
    return Ladder(
        task,
        probes,
        parameters(castled),
        folded,
        telling,
        trained_outputs,
        references,
        few,
        {name: Reference(handed[name], few.real, references[name].noise) for name in names},
        tuple(layers.values()),
        tuple(steps),
        folding,
        already_cast,
    )


def within_work(network: nn.Module, probes: Probes) -> Probes:
    """As many of the probes as one run of `network` may take, see WORK; all where their truth is known."""
    if probes.truth is not None:
        return probes
    return probes.at_most(WORK // max(1, work_of(network, (1, *probes.tensors.shape[1:])).macs))


def in_float64(network: nn.Module, names: Sequence[str], probes: Probes) -> dict[str, Array]:
    """The outputs of the network, its weights as they are, in float64; of the wider copy nothing stays."""
    return run(copied(network).double(), names, probes.tensors.astype(np.float64))


def exact_rung(name: str, exact: Mapping[str, Reference], outputs: Outputs, tolerance: Tolerance) -> Rung:
    """A rung that claims to change nothing, judged in float64."""
    compared = [
        compare(output, outputs[output], reference, tolerance, reference.power(tolerance))
        for output, reference in exact.items()
    ]
    return Rung(
        name,
        worst(output.rel for output in compared),
        tolerance.limit,
        Verdict.worst([output.verdict for output in compared]),
    )


@torch.no_grad()
def run(network: nn.Module, names: Sequence[str], tensors: Array, size: int = BATCH) -> dict[str, Array]:
    """The network's outputs on (P, C, H, W), by name, P first, in the tensors' dtype; `size` images at once."""
    batches = []
    for batch in torch.from_numpy(tensors).split(size):
        outputs = network(batch)
        batches.append(outputs if isinstance(outputs, tuple) else (outputs,))
    return {name: torch.cat(parts).numpy() for name, parts in zip(names, zip(*batches, strict=True), strict=True)}
