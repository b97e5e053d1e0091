"""Toolchains print: at import, in C++, on stdout. Nobody should read that, unless something fails."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from castling_deploy.errors import CastlingError, ExportError


@contextmanager
def captured() -> Iterator[IO[bytes]]:
    """What is written to the file descriptors 1 and 2 in the block goes into the file that is yielded.

    Below Python's level, because the noise comes from C++ too. Log records and warnings are held back as well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    disabled = logging.root.manager.disable
    with tempfile.TemporaryFile() as log, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
            logging.disable(disabled)


@contextmanager
def toolchain(subject: str) -> Iterator[None]:
    """A block in which somebody else's code runs: its noise is held back, and an error of its own, of any type, becomes
    an ExportError that starts with `subject` and ends with its last words. Errors of ours, and the disk's, pass."""
    with captured() as log:
        try:
            yield
        except (CastlingError, OSError):
            raise
        except Exception as error:
            words = tail(log)
            raise ExportError(
                f"{subject}: {type(error).__name__}: {str(error).strip()[:500]}",
                hint=f"its last words:\n{words}" if words else None,
            ) from error


def tail(log: IO[bytes], lines: int = 20) -> str:
    """The last lines of a captured log."""
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
