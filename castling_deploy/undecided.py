"""Why a comparison decides nothing, in words."""

from __future__ import annotations

from collections.abc import Iterator

from castling_deploy.parity import MIN_POWER, TOLERANCES, OutputParity, ParityReport, Rung, Verdict


def why_undecided(report: ParityReport) -> str | None:
    """The first reason why a report is inconclusive; None where it is not."""
    return next(_reasons(report), None) if report.verdict is Verdict.INCONCLUSIVE else None


def _reasons(report: ParityReport) -> Iterator[str]:
    for seen in report.witnesses:
        if seen.failure is not None and seen.failure.verdict is Verdict.INCONCLUSIVE:
            yield seen.failure.message
        for output in seen.outputs:
            if output.verdict is Verdict.INCONCLUSIVE:
                yield output_undecided(output, seen.limit or TOLERANCES[report.precision].limit)
    for rung in report.rungs:
        if rung.decisive and rung.verdict is Verdict.INCONCLUSIVE:
            yield f"the step '{rung.name}': {rung_undecided(rung)}"


def output_undecided(output: OutputParity, limit: float, real: int | None = None) -> str:
    """Why an inconclusive output is, with this limit on rel. `real` is how many real images it was compared on, where
    that is known: of a single one there is no spread."""
    if real == 1:
        return "a single real image was compared: without another there is nothing to measure an error against"
    if output.rel is None:
        return "every image gives the same output: there is nothing to measure an error against"
    if max(output.rel, output.noise_rel) > limit:
        return (
            "this network multiplies rounding errors: those of PyTorch itself come to "
            f"{output.noise_rel:.0e} of the spread in this arithmetic, with a limit of {limit:.0e}"
        )
    if output.widest_limit is None and not output.power:
        return "there is nothing in it that could be compared"
    return (
        f"the images are too alike: {output.power:.0%} of their pairs lie farther apart than the limit, and "
        f"{MIN_POWER:.0%} have to"
    )


def rung_undecided(rung: Rung) -> str:
    """Why an inconclusive step is, of which the error and the limit alone are known."""
    if rung.rel is None or rung.limit is None:
        return "there is nothing to measure an error against"
    if rung.rel > rung.limit:
        return f"rounding alone may have made its error, {rung.rel:.0e} of the spread with a limit of {rung.limit:.0e}"
    return "the images are too alike for its limit"
