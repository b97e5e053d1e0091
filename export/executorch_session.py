"""A .pte file, run by ExecuTorch's own runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from castling_deploy.errors import ExportError
from castling_deploy.target import Witness

if TYPE_CHECKING:
    from castling_deploy.target import Arrays

METADATA = "metadata"  # a method of the file without inputs, that returns a JSON text

_open: WeakSet[ExecuTorchSession] = WeakSet()  # a loaded program points into the thread pool of the process


class ExecuTorchSession:
    """`path`, ready to run on `threads` threads until `close()`. Raises ExportError when ExecuTorch does not load it.

    The threads are a pool of the process, which may only be replaced while no program is loaded: a second session with
    another number of threads is refused. Programs that the process loads without a session must not be alive either.
    """

    def __init__(self, path: Path, threads: int, witness: Witness) -> None:
        from executorch.runtime import Runtime

        if not path.is_file():
            raise ExportError(f"there is no {path.name} in {path.parent}", hint="export the network again")
        require_threads(threads)
        try:
            self._program = Runtime.get().load_program(path)
            self._forward = self._program.load_method("forward")
            (metadata,) = self._program.load_method(METADATA).execute([])
        except (RuntimeError, KeyError) as error:
            raise ExportError(
                f"ExecuTorch does not load {path.name}: {error}", hint="export the network again"
            ) from error
        facts = json.loads(metadata)
        self._inputs, self._outputs = facts["inputs"], facts["outputs"]
        self.witness = witness
        _open.add(self)

    def __call__(self, inputs: Arrays) -> Arrays:
        import numpy as np
        import torch

        if self._forward is None:
            raise ExportError("the session is closed", hint="run the artefact inside `with target.load(...)`")
        # ExecuTorch 1.5.1 takes a channels-last input for a contiguous one, without an error. Its outputs are copies.
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self._inputs]
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, self._forward.execute(tensors))}

    def close(self) -> None:
        """Unmap the file."""
        self._forward = self._program = None
        _open.discard(self)


def require_threads(threads: int) -> None:
    """Give the process's pool `threads` threads. Raises ExportError where an open session holds another pool."""
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

    if _threadpool_get_thread_count() == threads:
        return
    if _open:
        raise ExportError(
            f"an open ExecuTorch session runs on {_threadpool_get_thread_count()} threads, and there is "
            f"one pool: {threads} threads cannot be had beside it",
            hint="close that session first",
        )
    _unsafe_reset_threadpool(threads)
