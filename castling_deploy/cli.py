"""The command. People read stderr, machines read stdout; exit codes are those of `errors`.

Nothing heavy is imported before a command needs it: `castling --help` answers without torch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from castling_deploy.errors import (
    CastlingError,
    InconclusiveError,
    ParityError,
    RegressionError,
    TargetUnavailableError,
    UsageError,
)
from castling_deploy.plain import SCHEMA, plain
from castling_deploy.target import ALIASES, TARGETS, target_named

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
ALL = "all"
# Which exit code stands for a run with several outcomes: the gravest first.
GRAVEST = (
    1,
    2,
    ParityError.exit_code,
    InconclusiveError.exit_code,
    TargetUnavailableError.exit_code,
    RegressionError.exit_code,
    0,
)
INTERRUPTED = 130


class ImageSize(click.ParamType[tuple[int, int]]):
    """H or H,W in pixels."""

    name = "H[,W]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = [part.strip() for part in str(value).replace("x", ",").split(",")]
        if len(parts) not in (1, 2) or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            self.fail(f"'{value}' is no image size; write 224 or 224,320", param, ctx)
        sides = [int(part) for part in parts]
        return sides[0], sides[-1]


class Amount(click.FloatRange):
    """A number, zero or more. Not NaN and not infinity, which would let everything pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not math.isfinite(amount := super().convert(value, param, ctx)):
            self.fail(f"'{value}' is no number", param, ctx)
        return amount


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="castling-deploy", prog_name="castling")
def castling() -> None:
    """Takes a trained Castling-ViT to phones, browsers and GPUs, and proves what it ships.

    Exit codes: 0 ok, 1 internal failure, 2 bad input or usage, 3 parity failed, 4 target not available here,
    5 parity inconclusive, 6 performance regression, 130 interrupted.
    """


@castling.command(context_settings=CONTEXT)
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--target",
    "--format",
    "targets",
    multiple=True,
    required=True,
    metavar="NAME",
    help=f"Repeatable, or comma separated: {', '.join(TARGETS)}, or all that work here.",
)
@click.option("--model", "-m", metavar="NAME", help="A bundled network, or what the checkpoint is expected to be.")
@click.option("--init-dconv", type=click.Choice(["zero"]), help="For experiments: a softmax network with a zero dconv.")
@click.option("--precision", metavar="P", help="fp32, fp16 or int8. Default: the target's own.")
@click.option("--imgsz", type=ImageSize(), metavar="H[,W]", help="Input size in pixels. Default: the checkpoint's.")
@click.option("--batch-size", "-b", type=click.IntRange(1), default=1, show_default=True, help="Images at once.")
@click.option("--dynamic", is_flag=True, help="A batch of any size, where the target can.")
@click.option("--opset", type=int, help="ONNX opset.")
@click.option("--nms", is_flag=True, help="A detector's boxes in the graph, after its raw outputs; ONNX only.")
@click.option("--input", "content", metavar="KIND", help="tensor (normalised) or image (pixels), where the target can.")
@click.option("--calib-data", type=click.Path(path_type=Path), help="Images to calibrate int8 on.")
@click.option("--calib-samples", type=click.IntRange(1), help="How many of them.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("castling-out"),
    show_default=True,
    help="Folder for the artefact folders.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artefact folder of the same name.")
@click.option("--benchmark/--no-benchmark", default=True, show_default=True, help="Measure latency.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise among the compared inputs."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def export(
    checkpoint: Path | None,
    targets: tuple[str, ...],
    model: str | None,
    init_dconv: Literal["zero"] | None,
    precision: str | None,
    imgsz: tuple[int, int] | None,
    batch_size: int,
    dynamic: bool,
    opset: int | None,
    nms: bool,
    content: str | None,
    calib_data: Path | None,
    calib_samples: int | None,
    output: Path,
    overwrite: bool,
    benchmark: bool,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Export CHECKPOINT (without one: a bundled trained network), verify it, and measure it."""
    from castling_deploy.request import Request, plan

    asked = {
        "dynamic": dynamic or None,
        "opset": opset,
        "nms": nms or None,
        "input": content,
        "calib_data": calib_data,
        "calib_samples": calib_samples,
    }
    request = Request(
        targets=_names(targets),
        checkpoint=checkpoint,
        model=model,
        init_dconv=init_dconv,
        precision=precision,
        image_size=imgsz,
        batch_size=batch_size,
        options={name: value for name, value in asked.items() if value is not None},
        output=output,
        benchmark=benchmark,
        overwrite=overwrite,
        seed=seed,
    )
    steps = plan(request)
    if dry_run:
        return _dry_run(request, steps, as_json)
    from castling_deploy.console import print_deployment
    from castling_deploy.pipeline import deploy
    from castling_deploy.terminal import StderrProgress

    progress = StderrProgress()
    progress.console.print(
        f"castling export {checkpoint or 'the bundled ' + (model or 'network')} "
        f"to {', '.join(step.target.name for step in steps)}"
    )
    deployment = deploy(request, progress)
    print_deployment(deployment, progress.console)
    if as_json:
        from castling_deploy.report import deployment_document

        _print_json(deployment_document(deployment))
    from castling_deploy.report import exit_code

    codes = {exit_code(result) for result in deployment.results}
    return next(code for code in GRAVEST if code in codes)


def _dry_run(request: Any, steps: tuple[Any, ...], as_json: bool) -> int:
    if request.checkpoint is not None and not request.checkpoint.exists():
        raise UsageError(f"there is no file '{request.checkpoint}'", hint="check the path of the checkpoint")
    rows = [
        {
            "target": step.target.name,
            "precision": step.precision.value,
            "options": plain(step.options),
            "available": step.target.missing() is None,
        }
        for step in steps
    ]
    if as_json:
        _print_json({"schema": SCHEMA, "dry_run": rows, "output": str(request.output)})
    for row in rows:
        state = "" if row["available"] else "  (not available here, see castling doctor)"
        click.echo(
            f"would export {row['target']} {row['precision']} {row['options'] or ''} into {request.output}{state}",
            err=True,
        )
    return 0


@castling.command(context_settings=CONTEXT)
@click.argument("paths", metavar="[DIR]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Compare with this checkpoint again.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the checks into this file as JUnit XML.")
@click.option("--sarif", type=click.Path(path_type=Path), help="Write what did not pass into this file as SARIF.")
@click.option("--from", "saved", type=click.Path(path_type=Path), help="A parity.json: judge its numbers, run nothing.")
@click.option("--rel", type=Amount(0, min_open=True), help="With --from: the limit on error / spread, such as 1e-3.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify(
    paths: tuple[Path, ...],
    checkpoint: Path | None,
    junit: Path | None,
    sarif: Path | None,
    saved: Path | None,
    rel: float | None,
    as_json: bool,
) -> int:
    """Check artefact folders: their files, their golden outputs, and their parity with a checkpoint.

    All are checked; the gravest exit code counts. On GitHub Actions the outcome is added to the job's summary.
    """
    if saved is not None or rel is not None:
        if paths or checkpoint or junit or sarif:
            raise UsageError(
                "--from and --rel judge saved numbers and run nothing",
                hint="leave out folders, --checkpoint, --junit and --sarif, or leave out --from and --rel",
            )
        if saved is None or rel is None:
            raise UsageError("--from and --rel go together", hint="castling verify --from DIR/parity.json --rel 1e-3")
        return _judge_again(saved, rel, as_json)
    if not paths:
        raise UsageError("no artefact folder is named", hint="castling verify DIR")
    from castling_deploy.checks import examine
    from castling_deploy.ci_reports import refuse_inside, write_reports
    from castling_deploy.console import print_examined
    from castling_deploy.report import verification_document
    from castling_deploy.terminal import StderrProgress

    refuse_inside([path for path in (junit, sarif) if path is not None], paths)
    progress = StderrProgress()
    examined = []
    for path in paths:
        if len(paths) > 1:
            progress.console.print(f"castling verify {path}", soft_wrap=True)
        examined.append(examine(path, checkpoint, progress))
        print_examined(examined[-1], progress.console)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    write_reports(examined, junit, sarif, Path(summary) if summary else None)
    if len(examined) == 1 and examined[0].error is not None:
        raise examined[0].error
    if as_json:
        _print_json(verification_document(examined))
    codes = {_concluded(seen.conclusion) for seen in examined}
    return next(code for code in GRAVEST if code in codes)


def _judge_again(saved: Path, rel: float, as_json: bool) -> int:
    from castling_deploy.console import print_rejudged
    from castling_deploy.parity import Verdict
    from castling_deploy.rejudge import rejudge, rejudged_document
    from castling_deploy.terminal import stderr_console

    seen = rejudge(saved, rel)
    print_rejudged(seen, stderr_console())
    if as_json:
        _print_json(rejudged_document(seen))
    if seen.verdict is Verdict.FAIL:
        return _concluded(ParityError(f"'{saved}' fails with the limit {rel:g}", hint="do not ship the artefact"))
    if seen.verdict is Verdict.INCONCLUSIVE:
        return _concluded(
            InconclusiveError(
                f"the numbers of '{saved}' decide nothing with the limit {rel:g}",
                hint="the limit is wider than the images lie apart, or narrower than rounding; see its widest_limit",
            )
        )
    return 0


@castling.command(context_settings=CONTEXT)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def bench(paths: tuple[Path, ...], threads: int, as_json: bool) -> int:
    """Latency of artefact folders on this machine."""
    from castling_deploy.recheck import benchmark

    rows = []
    for path in paths:
        timing = benchmark(path, threads=threads)
        rows.append(
            {
                "path": str(path),
                "median_s": timing.median_s,
                "p95_s": timing.p95_s,
                "threads": threads,
                "times_s": timing.times_s,
            }
        )
        click.echo(
            f"{path}: median {timing.median_s * 1e3:.2f} ms, p95 {timing.p95_s * 1e3:.2f} ms, {threads} thread(s), "
            f"{len(timing.times_s)} runs",
            err=True,
        )
    if as_json:
        _print_json({"schema": SCHEMA, "latency": rows})
    return 0


@castling.command(context_settings=CONTEXT)
@click.argument("a", metavar="DIR_A", type=click.Path(path_type=Path))
@click.argument("b", metavar="DIR_B", type=click.Path(path_type=Path))
@click.option("--max-slower", type=Amount(0), default=10, show_default=True, help="Percent, on the same host.")
@click.option("--max-larger", type=Amount(0), default=5, show_default=True, help="Percent.")
@click.option("--max-drop", type=Amount(0), default=0.5, show_default=True, help="Percentage points of the score.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def diff(a: Path, b: Path, max_slower: float, max_larger: float, max_drop: float, as_json: bool) -> int:
    """Parity, score, size and latency of two artefact folders side by side; where DIR_B is worse, it fails.

    Read from what the exports wrote; `castling verify` tells whether the files are as they were exported.
    """
    from castling_deploy.comparison import Allowed
    from castling_deploy.comparison import diff as compared
    from castling_deploy.console import print_comparison
    from castling_deploy.report import comparison_document
    from castling_deploy.terminal import stderr_console

    comparison = compared(a, b, Allowed(max_slower, max_larger, max_drop))
    print_comparison(comparison, stderr_console())
    if as_json:
        _print_json(comparison_document(comparison))
    return _concluded(comparison.regression)


@castling.command(context_settings=CONTEXT)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--model", "-m", metavar="NAME", help="A bundled network.")
@click.option("--imgsz", type=ImageSize(), metavar="H[,W]", help="Input size in pixels.")
@click.option("--init-dconv", type=click.Choice(["zero"]), help="For experiments: a softmax network with a zero dconv.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(
    path: Path | None,
    model: str | None,
    imgsz: tuple[int, int] | None,
    init_dconv: Literal["zero"] | None,
    as_json: bool,
) -> int:
    """What a checkpoint or an artefact folder PATH is (without one: a bundled network)."""
    from castling_deploy import bundled, documents
    from castling_deploy.artifact import read_folder
    from castling_deploy.console import print_inspection
    from castling_deploy.folder import MANIFEST
    from castling_deploy.inspection import inspect_checkpoint
    from castling_deploy.terminal import stderr_console

    console = stderr_console()
    if path is not None and (path / MANIFEST).is_file():
        if model or imgsz or init_dconv:
            raise UsageError(
                "an artefact folder has its model and its size", hint="leave out --model, --imgsz and --init-dconv"
            )
        folder = read_folder(path)
        console.print_json(json.dumps(plain(folder.manifest)))
        document: Any = folder.manifest
    else:
        seen = inspect_checkpoint(path or bundled.checkpoint_path(model or bundled.DEFAULT), model, imgsz, init_dconv)
        print_inspection(seen, console)
        document = {"schema": SCHEMA, **plain(seen), "layers": documents.layers_document(seen.layers)}
    if as_json:
        _print_json(document)
    return 0


@castling.command(context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def models(names: tuple[str, ...], as_json: bool) -> int:
    """Every model that a checkpoint can be: NAMEs of models, families or tasks; all of them without."""
    from castling_deploy import bundled
    from castling_deploy.catalogue import catalogue, print_catalogue
    from castling_deploy.terminal import stderr_console

    entries = catalogue(names)
    if as_json:
        _print_json({"schema": SCHEMA, "models": entries})
    else:
        console = stderr_console()
        print_catalogue(entries, console)
        console.print(f"\ntrained and bundled: {', '.join(bundled.CHECKPOINTS)}", soft_wrap=True)
    return 0


@castling.command(context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(as_json: bool) -> int:
    """Which targets can be exported, run and verified here, and the exact line that mends what cannot."""
    from castling_deploy.console import print_health
    from castling_deploy.doctor import examine
    from castling_deploy.terminal import stderr_console

    health = examine()
    print_health(health, stderr_console())
    if as_json:
        _print_json({"schema": SCHEMA, **plain(health)})
    return 0


def _names(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets asked for; `all` is every one that is available here."""
    names = [name.strip().lower() for item in targets for name in item.split(",") if name.strip()]
    if not names:
        raise UsageError("no target is named", hint=f"--target takes: {', '.join([*TARGETS, *ALIASES, ALL])}")
    asked = [target_named(name).name for name in names if name != ALL]
    available = [name for name in TARGETS if target_named(name).missing() is None] if ALL in names else []
    return tuple(dict.fromkeys([*asked, *available]))


def _print_json(document: Any) -> None:
    click.echo(json.dumps(plain(document), allow_nan=False))


def _concluded(error: CastlingError | None) -> int:
    """The exit code of a command whose document is printed already: the two lines of an error, and no second one."""
    if error is None:
        return 0
    _say(error.message, error.hint)
    return error.exit_code


def main() -> NoReturn:
    """`castling`."""
    sys.exit(run(castling, sys.argv[1:], "castling"))


def export_main() -> NoReturn:
    """`castling-export`: the same as `castling export`."""
    sys.exit(run(export, sys.argv[1:], "castling-export"))


def run(command: click.Command, arguments: list[str], name: str) -> int:
    """Run a command; every failure is two lines on stderr and an exit code, and one JSON document where --json is."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # closed by >&-; the descriptor has to be taken
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # Threads that wait must sleep, not spin: beside one busy process on 2 cores the reference took 114 s, and so 2.6 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: _raise(KeyboardInterrupt()))  # so that a killed run tidies up too
    try:
        return int(command.main(arguments, prog_name=name, standalone_mode=False) or 0)
    except CastlingError as error:
        return _fail(arguments, error.message, error.hint, error.exit_code)
    except click.ClickException as error:
        asked = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
        message = (
            "no command is named"
            if isinstance(error, click.exceptions.NoArgsIsHelpError)
            else str(error.format_message())
        )
        return _fail(arguments, message.rstrip("."), f"{asked} --help lists what can be said", UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(arguments, "interrupted", "no unfinished artefact was left behind; run it again", INTERRUPTED)
    except Exception as error:  # a bug of ours
        if os.environ.get("CASTLING_TRACEBACK"):
            raise
        return _fail(
            arguments,
            f"internal failure: {type(error).__name__}: {error}",
            "set CASTLING_TRACEBACK=1 to see where, and report it",
            1,
        )


def _raise(error: BaseException) -> None:
    raise error


def _say(message: str, hint: str | None) -> None:
    click.echo(f"error: {message}" + (f"\n  hint: {hint}" if hint else ""), err=True)


def _fail(arguments: list[str], message: str, hint: str | None, code: int) -> int:
    _say(message, hint)
    if "--json" in arguments:
        _print_json({"schema": SCHEMA, "error": {"message": message, "hint": hint, "exit_code": code}, "artifacts": []})
    return code
