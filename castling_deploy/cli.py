"""The command. People read stderr, machines read stdout; exit codes are those of `errors`.

Nothing heavy is imported before a command needs it: `castling --help` answers without torch.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click

from castling_deploy.commands.bench import bench
from castling_deploy.commands.diff import diff
from castling_deploy.commands.doctor import doctor
from castling_deploy.commands.export import export
from castling_deploy.commands.inspect import inspect
from castling_deploy.commands.models import models
from castling_deploy.commands.options import CONTEXT
from castling_deploy.commands.outcome import print_json, say
from castling_deploy.commands.preprocess import preprocess
from castling_deploy.commands.setup import setup
from castling_deploy.commands.verify import verify
from castling_deploy.errors import CastlingError, UsageError
from castling_deploy.memory import lacking
from castling_deploy.plain import SCHEMA

INTERRUPTED = 130


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="castling-deploy", prog_name="castling")
def castling() -> None:
    """Takes a trained Castling-ViT to phones, browsers and GPUs, and proves what it ships.

    Exit codes: 0 ok, 1 internal failure, 2 bad input or usage, 3 parity failed, 4 target not available here,
    5 parity inconclusive, 6 performance regression, 130 interrupted.
    """


for command in (export, verify, bench, diff, inspect, models, preprocess, doctor, setup):
    castling.add_command(command)


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
    except Exception as error:  # a bug of ours, or no memory
        if os.environ.get("CASTLING_TRACEBACK"):
            raise
        told = lacking(error)
        if told is not None:
            return _fail(arguments, told.message, told.hint, told.exit_code)
        return _fail(
            arguments,
            f"internal failure: {type(error).__name__}: {error}",
            "set CASTLING_TRACEBACK=1 to see where, and report it",
            1,
        )


def _raise(error: BaseException) -> None:
    raise error


def _fail(arguments: list[str], message: str, hint: str | None, code: int) -> int:
    say(message, hint)
    if "--json" in arguments:
        print_json({"schema": SCHEMA, "error": {"message": message, "hint": hint, "exit_code": code}, "artifacts": []})
    return code
