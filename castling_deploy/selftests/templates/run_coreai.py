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

    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async def run(batch: np.ndarray) -> list[np.ndarray]:
        async with AIModelAsset.load(model).executable() as loaded:
            outputs = await loaded.load_function("main")({INPUT: NDArray(batch)})
            return [np.array(outputs[name].numpy()) for name in OUTPUTS]  # type: ignore[union-attr]  # no image is returned

    return lambda batch: asyncio.run(run(batch))


# </runtime>
