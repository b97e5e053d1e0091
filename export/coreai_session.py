"""An .aimodel folder, run by Apple's own runtime: on Linux its interpreter for the CPU, on macOS Core AI itself."""

from __future__ import annotations

from asyncio import Runner
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError
from castling_deploy.export.coreai_asset import require_whole
from castling_deploy.export.coreai_program import FUNCTION
from castling_deploy.target import Witness

if TYPE_CHECKING:
    from castling_deploy.target import Arrays


class CoreAISession:
    """`path`, ready to run until `close()`. Raises ExportError when the runtime does not load it.

    The runtime speaks asyncio. Its event loop lives in a thread of its own, for the caller may have one running: a
    notebook has.
    """

    def __init__(self, path: Path, witness: Witness) -> None:
        from coreai.authoring import AIModelAsset

        require_whole(path)
        self.witness = witness
        self._loop, self._thread, self._loaded = Runner(), ThreadPoolExecutor(1, "coreai"), AsyncExitStack()
        try:
            model = self._wait(lambda: self._loaded.enter_async_context(AIModelAsset.load(path).executable()))
            self._function: Any = model.load_function(FUNCTION)
        except (RuntimeError, KeyError) as error:
            self.close()
            raise ExportError(f"coreai does not load {path.name}: {error}", hint="export the network again") from error

    def __call__(self, inputs: Arrays) -> Arrays:
        import numpy as np
        from coreai.runtime import NDArray

        if self._function is None:
            raise ExportError("the session is closed", hint="run the artefact inside `with target.load(...)`")
        fed = {name: NDArray(np.ascontiguousarray(values)) for name, values in inputs.items()}
        outputs = self._wait(lambda: self._function(fed))
        return {name: np.array(values.numpy()) for name, values in outputs.items()}  # a copy: theirs is a view

    def close(self) -> None:
        """Let go of the model and of the thread."""
        self._function = None
        self._wait(self._loaded.aclose)
        self._thread.submit(self._loop.close).result()
        self._thread.shutdown()

    def _wait(self, start: Callable[[], Awaitable[Any]]) -> Any:
        async def started() -> Any:
            return await start()

        return self._thread.submit(lambda: self._loop.run(started())).result()
