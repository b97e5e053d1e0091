"""The part of selftest.py that runs an .onnx file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

INPUT, OUTPUTS = "image", ["logits"]


# <runtime>
def opened(model: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The model, ready: one batch in, every output in the order of OUTPUTS."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(OUTPUTS, {INPUT: batch})


# </runtime>
