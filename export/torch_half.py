"""A network in float16 for toolchains that take the precision from the program they are given."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def in_half(module: nn.Module) -> nn.Module:
    """A copy with float16 weights and arithmetic that takes and returns float32."""
    from torch import Tensor, nn

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(module).half()

        def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
            outputs = self.network(image.half())
            if isinstance(outputs, tuple):
                return tuple(output.float() for output in outputs)
            return outputs.float()

    return Half().eval()
