"""A program that answers tensors on its pipes: how this process talks to a runtime under emulation.

The program first says, in one line of JSON, the names of its inputs and outputs. Then, as long as tensors come in on
stdin, it answers on stdout with its outputs. A tensor is one line (`float32 1 3 224 224`) and its bytes. When this
process is gone, stdin ends, and the program with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from castling_deploy.errors import ExportError
from castling_deploy.quiet import tail
from castling_deploy.target import Witness

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from castling_deploy.target import Arrays


class GuestSession:
    """The running program, as a Session. Raises ExportError when it ends before its time."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], witness: Witness) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._log, self.witness = process, log, witness
        self._in, self._out = process.stdin, process.stdout
        names = json.loads(self._line())
        self._inputs, self._outputs = names["inputs"], names["outputs"]

    def __call__(self, inputs: Arrays) -> Arrays:
        try:
            for name in self._inputs:
                values = inputs[name]
                self._in.write(" ".join([values.dtype.name, *map(str, values.shape)]).encode() + b"\n")
                self._in.write(values.tobytes())
            self._in.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return {name: self._tensor() for name in self._outputs}

    def _tensor(self) -> npt.NDArray[np.generic]:
        import numpy as np

        dtype, *shape = self._line().split()
        sizes = tuple(map(int, shape))
        length = math.prod(sizes) * np.dtype(dtype).itemsize
        data = self._out.read(length)
        if len(data) < length:
            raise self._ended()
        return np.frombuffer(data, dtype).reshape(sizes)

    def _line(self) -> str:
        line = self._out.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        return line.decode()

    def _ended(self) -> ExportError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        words = tail(self._log)
        return ExportError(f"{self.witness.name} {how}", hint=f"its last words:\n{words}" if words else None)


@contextmanager
def guest(command: Sequence[str], witness: Witness) -> Iterator[GuestSession]:
    """The program of `command` while the block lasts. Its noise is held back; ExportError ends with its last words."""
    with (
        tempfile.TemporaryFile() as log,
        # No session of its own: whoever kills this process's group kills the program too.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            yield GuestSession(process, log, witness)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # what was not flushed has nobody to go to
                process.stdin.close()  # type: ignore[union-attr]
