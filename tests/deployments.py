"""Real deployments through the public command, made once and looked at by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castling_deploy.cli import castling as castling_command
from castling_deploy.cli import run
from castling_deploy.isolation import IN_PROCESS, Worker

# x86 kernels are chosen by what the machine offers; one thread keeps runs alike and the tests' machine usable.
# Toolchains run in the process of the command: two more interpreters for every export double the time of the tests.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", IN_PROCESS: "1"}
ISOLATED = {name: value for name, value in ENVIRONMENT.items() if name != IN_PROCESS}


@dataclass(frozen=True)
class Run:
    """A finished `castling` process."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


def castling(*arguments: str | Path, cwd: Path | None = None) -> Run:
    """`castling` with these arguments, in a process of its own, stdout and stderr apart.

    The process is forked from one that has loaded torch, as workers are: a fresh interpreter takes 3 s of CPU before it
    begins, and the tests run a few hundred commands. Where forking is not to be had, it is a fresh one.
    """
    inside = os.environ.pop(IN_PROCESS, None)
    try:
        worker = Worker()
    finally:
        if inside is not None:
            os.environ[IN_PROCESS] = inside
    with worker:
        return worker.call("castling", _run, [*map(str, arguments)], cwd or Path.cwd(), ENVIRONMENT)


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> Run:
    """In that process: the command, with what it writes below Python's level too."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["castling", *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code = run(castling_command, arguments, "castling")
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return Run(code, out.read().decode(), err.read().decode())


def without_torch(*arguments: str) -> Run:
    """`castling` where torch cannot be imported."""
    code = "import sys\nsys.modules['torch'] = None\nfrom castling_deploy.cli import main\nmain()"
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    return Run(process.returncode, process.stdout, process.stderr)
