"""The part of selftest.py that runs a .pte file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np


# <runtime>
def opened(model: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The model, ready: one batch in, every output in the order of OUTPUTS."""
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(model)
    alive = program, program.load_method("forward")  # the method points into the program
    return lambda batch: [output.numpy().copy() for output in alive[1].execute([torch.from_numpy(batch)])]


# </runtime>
