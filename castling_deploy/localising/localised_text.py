"""A search for a fault, as people read it: which layer, where in the source, what the numbers say, what to do."""

from __future__ import annotations

from rich.console import Console

from castling_deploy.localising.diagnosis import Cause
from castling_deploy.localising.localisation import Finding, Localisation, Seen

ADVICE = {
    Cause.OVERFLOW: "export with --precision fp32; --islands keeps such layers in it, unless that is the whole network",
    Cause.CANCELLATION: "export with --precision fp32, which rounds these terms 8000 times finer",
    Cause.ROUNDING: "no one module is to blame: export with --precision fp32, or accept a wider limit",
    Cause.UNSUPPORTED: "replace this operator in the network, or use another target",
    Cause.WEIGHTS: "a converter's fault: report it with the folder below, or use another version of the converter",
    Cause.FILE: "export the network again; the file as it is has not been verified",
    Cause.OPERATOR: "report it to the makers of the converter or the runtime with the folder below",
}


def print_localised(localisation: Localisation, console: Console) -> None:
    """A dozen lines at most: the place first, then the numbers, then what to do."""
    title = f"{localisation.target} {localisation.precision}"
    if localisation.finding is Finding.NOTHING:
        console.print(
            f"{title}: nothing is wrong (error {_rel(localisation.rel)} of the spread)", style="green", soft_wrap=True
        )
        if localisation.evidence:
            console.print(f"  {localisation.evidence}", style="yellow", soft_wrap=True)
        return
    place = localisation.place
    if place is None:
        console.print(f"{title}: {localisation.finding}", style="red", soft_wrap=True)
    else:
        console.print(
            f"{title}: it goes wrong in {place} ({place.kind}), at '{place.operator}'", style="red", soft_wrap=True
        )
        if place.source:
            console.print(f"  asked for at {place.source}:  {place.code}", soft_wrap=True)
    if localisation.origin not in (None, place):
        console.print(f"  the numbers come from {localisation.origin} before it", soft_wrap=True)
    if localisation.wrong is not None:
        before = localisation.before
        console.print(f"  last right:  {'the input' if before is None else _line(before)}", soft_wrap=True)
        console.print(f"  first wrong: {_line(localisation.wrong)}", soft_wrap=True)
    if localisation.evidence:
        cause = "" if localisation.cause is None else f"likely {localisation.cause}: "
        console.print(f"  {cause}{localisation.evidence}", soft_wrap=True)
    for name in localisation.differing[:3]:
        console.print(f"  differs: {name}", soft_wrap=True)
    if localisation.cause is not None:
        console.print(f"  what to do: {ADVICE[localisation.cause]}", style="yellow", soft_wrap=True)
    if localisation.folder is not None:
        console.print(f"  see it alone: python {localisation.folder / 'repro.py'}", soft_wrap=True)
    console.print(f"  {localisation.exports} exports, {localisation.seconds:.0f} s", style="dim", soft_wrap=True)


def _line(seen: Seen) -> str:
    """One value: where, how far off, and how large its numbers are."""
    shape, actual = "x".join(map(str, seen.reference.shape)), seen.actual
    error = "" if seen.rel is None else f", error {_rel(seen.rel)} of the spread"
    line = f"{seen.place} '{seen.place.operator}', {shape}{error}; up to {seen.reference.max_abs:.4g} in PyTorch"
    if actual is None:
        return line
    infinite = f", {100 * actual.nonfinite:.2g} % infinite or NaN" if actual.nonfinite else ""
    return f"{line}, {actual.max_abs:.4g} in the artefact{infinite}"


def _rel(rel: float | None) -> str:
    return "-" if rel is None else f"{rel:.1e}"
