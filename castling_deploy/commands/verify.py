"""`castling verify`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from castling_deploy.commands.options import CONTEXT, Amount, limited, limits_of
from castling_deploy.commands.outcome import concluded, gravest, print_json
from castling_deploy.errors import InconclusiveError, ParityError, UsageError
from castling_deploy.runner import ALL, require_known


@click.command(context_settings=CONTEXT)
@click.argument("paths", metavar="[DIR]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Compare with this checkpoint again.")
@click.option(
    "--on",
    multiple=True,
    metavar="NAME",
    help="Who runs them: one or more names of castling doctor, or all. Default: the target's own.",
)
@click.option("--localise", is_flag=True, help="Name the first module that goes wrong, and write what reproduces it.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the checks into this file as JUnit XML.")
@click.option("--sarif", type=click.Path(path_type=Path), help="Write what did not pass into this file as SARIF.")
@click.option("--from", "saved", type=click.Path(path_type=Path), help="A parity.json: judge its numbers, run nothing.")
@click.option("--rel", type=Amount(0, min_open=True), help="With --from: the limit on error / spread, such as 1e-3.")
@limited
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify(
    paths: tuple[Path, ...],
    checkpoint: Path | None,
    on: tuple[str, ...],
    localise: bool,
    junit: Path | None,
    sarif: Path | None,
    saved: Path | None,
    rel: float | None,
    timeout: float | None,
    memory: float | None,
    as_json: bool,
) -> int:
    """Check artefact folders: their files, their golden outputs, and their parity with a checkpoint.

    All are checked; the gravest exit code counts. On GitHub Actions the outcome is added to the job's summary.
    """
    if saved is not None or rel is not None:
        if paths or checkpoint or on or localise or junit or sarif:
            raise UsageError(
                "--from and --rel judge saved numbers and run nothing",
                hint="leave out everything else but --json, or leave out --from and --rel",
            )
        if saved is None or rel is None:
            raise UsageError("--from and --rel go together", hint="castling verify --from DIR/parity.json --rel 1e-3")
        return _judge_again(saved, rel, as_json)
    if not paths:
        raise UsageError("no artefact folder is named", hint="castling verify DIR")
    names = [name.strip().lower() for item in on for name in item.split(",") if name.strip()]
    if on and not names:
        raise UsageError("--on names nobody", hint=f"castling doctor lists the names; or --on {ALL}")
    require_known(names)  # before torch is imported, and before any file is read
    from castling_deploy.localising.localised_text import print_localised
    from castling_deploy.rechecking.checks import examine
    from castling_deploy.rechecking.ci_reports import refuse_inside, write_reports
    from castling_deploy.rechecking.console_checks import print_examined
    from castling_deploy.report import verification_document
    from castling_deploy.terminal import StderrProgress

    refuse_inside([path for path in (junit, sarif) if path is not None], paths)
    progress = StderrProgress()
    examined = []
    for path in paths:
        if len(paths) > 1:
            progress.console.print(f"castling verify {path}", soft_wrap=True)
        limits = limits_of(timeout, memory)
        seen = examine(path, checkpoint, progress, on=names, limits=limits, localise=localise)
        examined.append(seen)
        print_examined(seen, progress.console)
        if seen.localisation is not None:
            print_localised(seen.localisation, progress.console)
        if seen.not_localised is not None:
            progress.console.print(f"not localised: {seen.not_localised}", style="yellow", soft_wrap=True)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    write_reports(examined, junit, sarif, Path(summary) if summary else None)
    if len(examined) == 1 and examined[0].error is not None:
        raise examined[0].error
    if as_json:
        print_json(verification_document(examined))
    return gravest(concluded(seen.conclusion) for seen in examined)


def _judge_again(saved: Path, rel: float, as_json: bool) -> int:
    from castling_deploy.console import print_rejudged
    from castling_deploy.parity import Verdict
    from castling_deploy.rechecking.rejudge import rejudge, rejudged_document
    from castling_deploy.terminal import stderr_console

    seen = rejudge(saved, rel)
    print_rejudged(seen, stderr_console())
    if as_json:
        print_json(rejudged_document(seen))
    if seen.verdict is Verdict.FAIL:
        return concluded(ParityError(f"'{saved}' fails with the limit {rel:g}", hint="do not ship the artefact"))
    if seen.verdict is Verdict.INCONCLUSIVE:
        return concluded(
            InconclusiveError(
                f"the numbers of '{saved}' decide nothing with the limit {rel:g}",
                hint="the limit is wider than the images lie apart, or narrower than rounding; see its widest_limit",
            )
        )
    return 0
