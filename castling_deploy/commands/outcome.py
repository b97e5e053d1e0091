"""How a verb ends: its document on stdout, the two lines of an error on stderr, an exit code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

from castling_deploy.errors import (
    CastlingError,
    InconclusiveError,
    ParityError,
    RegressionError,
    TargetUnavailableError,
)
from castling_deploy.plain import plain

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


def gravest(codes: Iterable[int]) -> int:
    """The exit code of several outcomes."""
    found = set(codes)
    return next(code for code in GRAVEST if code in found)


def print_json(document: Any) -> None:
    """The one document of a run, on stdout."""
    click.echo(json.dumps(plain(document), allow_nan=False))


def say(message: str, hint: str | None) -> None:
    """The two lines of an error."""
    click.echo(f"error: {message}" + (f"\n  hint: {hint}" if hint else ""), err=True)


def concluded(error: CastlingError | None) -> int:
    """The exit code of a command whose document is printed already: the two lines of an error, and no second one."""
    if error is None:
        return 0
    say(error.message, error.hint)
    return error.exit_code
