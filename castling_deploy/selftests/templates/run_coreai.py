"""The part of selftest.py that runs an .aimodel folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

INPUT, OUTPUTS = "image", ["logits"]


# <runtime>
def opened(model: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The model, ready: one batch in, every output in the order of OUTPUTS."""
    import asyncio
    import hashlib

    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    # The runtime (1.0.0b3) ends the process when it cannot read the program, without a word.
    if hashlib.sha256((model / "main.mlirb").read_bytes()).digest() != (model / "main.hash").read_bytes():
        raise ValueError("main.mlirb is not the program that main.hash is of")
    loop = asyncio.Runner()

    executable = AIModelAsset.load(model).executable()
    loaded = loop.run(executable.__aenter__())  # until the process ends
    function = loaded.load_function("main")

    async def run(batch: np.ndarray) -> list[np.ndarray]:
        outputs = await function({INPUT: NDArray(batch)})
        return [np.array(outputs[name].numpy()) for name in OUTPUTS]  # type: ignore[union-attr]  # no image is returned

    return lambda batch: loop.run(run(batch))


# </runtime>
