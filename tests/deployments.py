"""Real deployments through the public command, made once and looked at by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castling_deploy.isolation import IN_PROCESS

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
    """`castling` with these arguments, in a process of its own, stdout and stderr apart."""
    process = subprocess.run(
        [sys.executable, "-c", "from castling_deploy.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
    )
    return Run(process.returncode, process.stdout, process.stderr)
