"""What trials and their numbers add up to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import fx

from castling_deploy.localising.diagnosis import SQUARES, Cause, Statistics, likely, watch
from castling_deploy.localising.localisation import Finding, Localisation, Seen
from castling_deploy.localising.prefix import operator
from castling_deploy.localising.suspects import beyond_half, missing_weights
from castling_deploy.localising.trials import Ran, Trials, Whole
from castling_deploy.parity import Verdict
from castling_deploy.target import Precision, Readable


def ended(trials: Trials, finding: Finding, whole: Whole, evidence: str = "") -> Localisation:
    """A search that ended with the whole network."""
    return Localisation(trials.target.name, trials.precision, finding, whole.verdict, whole.rel, evidence=evidence)


def nothing(trials: Trials, whole: Whole) -> Localisation:
    """Nothing is wrong by this witness; where float16 does not reach as far as the network's numbers, that is said:
    a runtime that keeps them in float32 between operators, as some do on x86, sees no overflow."""
    found = ended(trials, Finding.NOTHING, whole)
    if trials.precision is not Precision.FP16:
        return found
    largest = watch(trials.traced, trials.tensors).largest
    beyond = [node for node in beyond_half(trials.traced, largest) if operator(node) not in SQUARES]
    if not beyond:
        return found
    origin = trials.traced.place(beyond[0])
    return replace(
        found,
        origin=origin,
        evidence=f"but numbers in {origin} reach {largest[beyond[0]]:.3g}, and float16 ends at 65504: "
        "a device that stores float16 there overflows, though what ran the artefact here did not",
    )


def edited(trials: Trials, suspect: Whole, fresh: Whole) -> Localisation:
    """The suspect is wrong and a fresh export is not."""
    differing: tuple[str, ...] = ()
    evidence = "a fresh export passes, and so every prefix of it: the file differs from what this version exports"
    if isinstance(trials.target, Readable):
        differing = _differing(trials.target, suspect.folder, fresh.folder)
        if differing:
            evidence += f"; the first constant that differs is {differing[0]}, of {len(differing)}"
        else:
            evidence += "; all its constants are the same, so it is an operator or an attribute that differs"
    return replace(ended(trials, Finding.FILE, suspect, evidence), cause=Cause.FILE, differing=differing)


def _differing(target: Readable, suspect: Path, fresh: Path) -> tuple[str, ...]:
    """Names of constants that are not the same in both folders."""
    theirs, ours = target.constants(suspect), target.constants(fresh)
    return tuple(
        name
        for name in dict.fromkeys((*ours, *theirs))
        if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name])
    )


def unknown(trials: Trials, message: str) -> Localisation:
    """The whole network cannot be exported, or does not run, and no prefix says why."""
    return Localisation(
        trials.target.name, trials.precision, Finding.UNKNOWN, Verdict.FAIL, None, evidence=_in_a_line(message)
    )


def unsupported(trials: Trials, node: fx.Node, message: str) -> Localisation:
    """`node` ends the shortest prefix that cannot be exported."""
    place = trials.traced.place(node)
    evidence = f"the network up to {place} cannot be exported, what is before '{place.operator}' can: "
    return replace(
        unknown(trials, message),
        finding=Finding.UNSUPPORTED,
        place=place,
        cause=Cause.UNSUPPORTED,
        evidence=evidence + _in_a_line(trials.refusal(node) or message),
    )


def faulty_module(trials: Trials, whole: Whole, node: fx.Node, last: fx.Node | None) -> Localisation:
    """`node` is the first wrong value; `last` the last right one that it is computed from."""
    traced = trials.traced
    wrong, before = _seen(trials, node), None if last is None else _seen(trials, last)
    between = (traced.ancestors(node) | {node}) - traced.ancestors(last) if last else {node}
    watched = watch(traced, trials.tensors, [node])
    missing = missing_weights(trials.target, traced, [node], _ran(trials, node).folder)
    beyond = [one for one in beyond_half(traced, watched.largest) if one in between]
    cause, evidence = likely(
        trials.precision,
        wrong.reference,
        wrong.actual,
        rel=wrong.rel,
        rel_before=before.rel if before else None,
        largest_inside=max((watched.largest.get(one, 0.0) for one in between - traced.protected), default=0.0),
        terms=watched.terms.get(node),
        missing_weights=None if missing is None else sorted(missing),
    )
    return replace(
        ended(trials, Finding.MODULE, whole, evidence),
        place=wrong.place,
        origin=traced.place(beyond[0]) if beyond and cause is Cause.OVERFLOW else None,
        cause=cause,
        wrong=wrong,
        before=before,
    )


def _ran(trials: Trials, node: fx.Node) -> Ran:
    """The prefix of a node that was found right or wrong, and so was run."""
    ran = trials.prefix(node)
    assert ran is not None
    return ran


def _seen(trials: Trials, node: fx.Node) -> Seen:
    ran = _ran(trials, node)
    return Seen(
        trials.traced.place(node),
        ran.parity.verdict,
        ran.parity.rel,
        Statistics.of(ran.expected, trials.real),
        Statistics.of(ran.outputs, trials.real),
    )


def _in_a_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)[:400]
