"""Where an artefact leaves the limit: the first operator, and its module, whose output is wrong.

The network is cut off after one of its modules, and the prefix is tried like any network. Cuts are bisected, from
blocks down to operators. What looks guilty is tried first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from castling_deploy.errors import CastlingError, UsageError
from castling_deploy.localising import findings, repro
from castling_deploy.localising.cases import cases_of
from castling_deploy.localising.diagnosis import watch
from castling_deploy.localising.localisation import Finding
from castling_deploy.localising.localisation import Localisation as Localisation
from castling_deploy.localising.search import Search
from castling_deploy.localising.suspects import suspected
from castling_deploy.localising.trials import Trials, Whole
from castling_deploy.probes import Probes
from castling_deploy.progress import Progress, Silent
from castling_deploy.target import Artifact, Network, Precision, Target

EXPECTED = 4  # exports to come, as far as a progress bar is concerned


def localise(
    target: Target,
    network: Network,
    precision: Precision,
    options: Any,
    probes: Probes,
    progress: Progress | None = None,
    *,
    folder: Path,
    suspect: tuple[Artifact, Path] | None = None,
    fresh: bool = False,
) -> Localisation:
    """Find where artefacts of `network` go wrong; what reproduces it is written to `folder`.

    `suspect`, an artefact and the folder it lies in, is judged first, and where a fresh export is right, the two are
    compared. Where it is `fresh` itself, it is not exported again. Without it the fresh export is the one that is
    judged. Raises ExportError where the network cannot be traced at all, UsageError for a precision that this finds
    nothing in.
    """
    refuse(precision)
    progress, began = progress or Silent(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        with progress.stage("trace the network and run the reference"):
            trials = Trials(target, network, precision, options, probes, Path(scratch))
        with progress.stage(f"{target.name}: find the module that goes wrong") as advance:
            result, wrong = _found(
                trials, suspect, fresh, lambda: advance(trials.exports / (trials.exports + EXPECTED))
            )
        if result.place is not None and wrong is not None:
            with progress.stage(f"{target.name}: write what reproduces it"):
                cases = list(cases_of(trials, wrong))
                limit = trials.tolerance.limit
                result = replace(
                    result, folder=repro.write(folder, target, result.place, result.evidence, cases, limit)
                )
    return replace(result, exports=trials.exports, seconds=time.perf_counter() - began, trials=tuple(trials.made))


def refuse(precision: Precision) -> None:
    """Raises UsageError for a precision in which prefixes say nothing of the whole."""
    if precision is Precision.INT8:
        raise UsageError(
            "an int8 artefact has no first wrong module: errors of 8 bits add up, from many modules",
            hint="see 'ranking' under 'int8' in parity.json: the modules by their sensitivity to 8 bits",
        )


def _found(
    trials: Trials, suspect: tuple[Artifact, Path] | None, fresh: bool, step: Callable[[], None]
) -> tuple[Localisation, fx.Node | None]:
    """What the search ends with, and the first wrong value where there is one.

    The whole first; then, where it is wrong, the bisection.
    """
    said = None if suspect is None else trials.judged(*suspect)
    if said is not None and not said.wrong:
        return findings.nothing(trials, said), None
    if said is not None and fresh:
        return _first_wrong(trials, said, step)
    try:
        whole = trials.whole()
    except CastlingError as error:
        return _first_refused(trials, error.message, step), None
    if whole.wrong:
        return _first_wrong(trials, whole, step)
    return findings.nothing(trials, whole) if said is None else findings.edited(trials, said, whole), None


def _first_wrong(trials: Trials, whole: Whole, step: Callable[[], None]) -> tuple[Localisation, fx.Node | None]:
    """The whole network is wrong."""
    traced, names = trials.traced, [spec.name for spec in trials.network.outputs]

    def judge(node: fx.Node) -> bool | None:
        ran = trials.prefix(node)
        return None if ran is None else whole.counts_as_wrong(ran.parity)

    search = Search(traced, judge, step)
    largest = watch(traced, trials.tensors).largest
    for end in sorted((traced.outputs[names.index(name)] for name in whole.wrong), key=traced.order.__getitem__):
        suspects = suspected(trials.target, traced, end, trials.precision, largest, whole.folder)
        first = search.first(end, suspects)
        if judge(first):  # the last prefix is the whole network: exported only if nothing before it is wrong
            return findings.faulty_module(trials, whole, first, search.last_right(first)), first
    return findings.ended(
        trials,
        Finding.WHOLE,
        whole,
        "every prefix of a fresh export passes, its last one too, and the whole network does not: the fault is in the "
        "options or in what the target adds behind the network",
    ), None


def _first_refused(trials: Trials, message: str, step: Callable[[], None]) -> Localisation:
    """The whole network cannot be exported, or does not run."""

    def judge(node: fx.Node) -> bool:
        return trials.refusal(node) is not None

    ends = [end for end in trials.traced.outputs if trials.traced.exportable(end) and judge(end)]
    if not ends:
        return findings.unknown(trials, message)
    return findings.unsupported(trials, Search(trials.traced, judge, step).first(ends[0]), message)
