"""Artefact folders as lists of checks: each with a verdict of its own, for people, CI reports and the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from castling_deploy.errors import CastlingError, InconclusiveError, ParityError, TargetUnavailableError, UsageError
from castling_deploy.isolation import Limits
from castling_deploy.localising.fault import find_fault
from castling_deploy.localising.localise import Localisation
from castling_deploy.parity import TOLERANCES, ParityReport, Verdict, WitnessReport
from castling_deploy.progress import Progress
from castling_deploy.rechecking.claims import Claims
from castling_deploy.rechecking.recheck import Recheck, verify
from castling_deploy.target import Precision, WitnessKind
from castling_deploy.undecided import output_undecided, rung_undecided, why_undecided

AT_EXPORT = "at its export"  # the group of what is read from parity.json, and not run again


@dataclass(frozen=True)
class Check:
    """One question asked of an artefact. `rel` and `limit` are null where no number decides.

    One that is not `decisive` is told and decides nothing (the cast is an approximation). `group` says what was asked.
    """

    group: str
    name: str
    verdict: Verdict
    decisive: bool = True
    rel: float | None = None
    limit: float | None = None
    said: str | None = None

    @property
    def evidence(self) -> str:
        """The numbers in words, and what was `said`; empty where there is neither."""
        limit = "" if self.limit is None else f", limit {self.limit:.0e}"
        numbers = None if self.rel is None else f"error / spread {self.rel:.1e}{limit}"
        return "; ".join(each for each in (numbers, self.said) if each is not None)

    @property
    def told(self) -> str:
        """The verdict and its evidence."""
        return f"{self.verdict}: {self.evidence}" if self.evidence else str(self.verdict)


@dataclass(frozen=True)
class Examined:
    """An artefact folder and every check of it, or the error that kept it from being checked."""

    path: Path
    checks: tuple[Check, ...] = ()
    recheck: Recheck | None = None
    error: CastlingError | None = None
    localisation: Localisation | None = None
    not_localised: CastlingError | None = None

    @property
    def verdict(self) -> Verdict | None:
        """That of the gravest check; None where nothing could be checked."""
        return None if self.error else Verdict.worst([check.verdict for check in self.checks if check.decisive])

    @property
    def reason(self) -> str | None:
        """What made a verdict that is no pass: the first check that came to it, before others one that says why."""
        made = [check for check in self.checks if check.decisive and check.verdict is self.verdict]
        if self.verdict in (None, Verdict.PASS) or not made:
            return None
        first = next((check for check in made if check.evidence), made[0])
        return ": ".join(part for part in (first.group, first.name, first.evidence) if part)

    @property
    def conclusion(self) -> CastlingError | None:
        """What a failed check comes to; None when all is well."""
        if self.error is not None:
            return self.error
        if self.verdict is Verdict.FAIL:
            return ParityError(f"'{self.path}' does not compute what it has to", hint="do not ship it; export it again")
        if self.verdict is Verdict.INCONCLUSIVE:
            return InconclusiveError(
                f"the comparison of '{self.path}' decides nothing",
                hint="its parity.json has the numbers; castling verify --from parity.json --rel R takes another limit",
            )
        return None

    @property
    def exit_code(self) -> int:
        return 0 if self.conclusion is None else self.conclusion.exit_code


def examine(
    path: Path,
    checkpoint: Path | None,
    progress: Progress,
    *,
    on: Sequence[str] = (),
    limits: Limits | None = None,
    localise: bool = False,
) -> Examined:
    """Every check of one folder. What goes wrong with it is in the result, so that it costs no other folder its own.

    `localise` names the first module that goes wrong, also of a folder that was changed since its export.
    """
    try:
        recheck = verify(path, checkpoint, progress, on=on, limits=limits)
        seen = Examined(path, tuple(_checks(recheck)), recheck)
    except CastlingError as error:
        seen = Examined(path, error=error)
    if not localise or isinstance(seen.error, UsageError | TargetUnavailableError):
        return seen
    try:
        return replace(seen, localisation=find_fault(path, checkpoint, progress, limits or Limits()))
    except CastlingError as error:
        return replace(seen, not_localised=error)


def _checks(seen: Recheck) -> Iterator[Check]:
    """Without a new comparison with the checkpoint, what the export found counts beside the golden images."""
    limit = TOLERANCES[seen.folder.precision].limit
    yield Check("files", "as they were exported", Verdict.PASS)
    yield from _built(seen.claims, seen.folder.precision)
    if seen.contradicted:
        return
    for report in seen.golden:
        yield from _outputs("golden images", report, limit, seen.folder.golden_real)
    if seen.parity is not None:
        yield from _report(f"{seen.parity.probes} images", seen.parity, limit)
        return
    yield Check(AT_EXPORT, "verdict", seen.folder.verdict, said=why_undecided(seen.saved.report))
    yield from _report(AT_EXPORT, seen.saved.report, limit)


def _built(claims: Claims, precision: Precision) -> Iterator[Check]:
    if claims.missing is not None:
        said = f"not read back here: {claims.missing.reason}"
        yield Check("built", "as the manifest claims", Verdict.INCONCLUSIVE, decisive=False, said=said)
    elif not claims.contradictions:
        yield Check("built", f"in {precision}, with the facts of the manifest", Verdict.PASS)
    for said in claims.contradictions:
        yield Check("built", "as the manifest claims", Verdict.FAIL, said=said)
    if claims.not_compared is not None:
        said = f"not compared: {claims.not_compared}"
        yield Check("built", "README and self-tests", Verdict.INCONCLUSIVE, decisive=False, said=said)


def _report(group: str, report: ParityReport, limit: float) -> Iterator[Check]:
    for rung in report.rungs:
        is_open = rung.decisive and rung.verdict is Verdict.INCONCLUSIVE
        said = rung_undecided(rung) if is_open else None
        yield Check(group, f"rung {rung.name}", rung.verdict, rung.decisive, rung.rel, rung.limit, said)
    for seen in report.witnesses:
        yield from _outputs(group, seen, limit)


def _outputs(group: str, seen: WitnessReport, limit: float, real: int | None = None) -> Iterator[Check]:
    by = f"by {seen.witness.name} ({seen.witness.kind})"
    if seen.failure is not None:
        yield Check(group, f"run {by}", seen.verdict, said=seen.failure.message)
    elif seen.witness.kind is WitnessKind.BUILDER:
        yield Check(group, f"taken {by}", seen.verdict)
    for output in seen.outputs:
        own = seen.limit or limit
        said = output_undecided(output, own, real) if output.verdict is Verdict.INCONCLUSIVE else None
        yield Check(group, f"{output.name}, {by}", output.verdict, True, output.rel, own, said)
