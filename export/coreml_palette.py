"""Palettised Linears on their way to Core ML: an operation of our own in torch, and the look-up that it becomes in MIL.

Before iOS 18, Core ML has one table for a whole weight: none for a group of channels, and no scales beside it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from castling_deploy.export.coremltools_parts import converter
from castling_deploy.export.torch_int8 import with_linears
from castling_deploy.palette import palettised

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from castling_deploy.eight_bits import Quantisation

LOOK_UP = "castling::look_up"


def in_palettes(network: nn.Module, quantisation: Quantisation) -> nn.Module:
    """A copy of `network` (folded, float32) whose Linears in `quantisation` look their weights up in tables."""
    import torch
    from torch import nn

    look_up = operation()

    class Linear(nn.Module):
        """Shape: (..., C_in) -> (..., C_out)."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            assert quantisation.palette is not None
            indices, table = map(torch.from_numpy, palettised(linear.weight.detach().numpy(), quantisation.palette))
            self.indices, self.table, self.bias = nn.Buffer(indices), nn.Buffer(table.float()), linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, look_up(self.indices, self.table), self.bias)

    return with_linears(network, quantisation, Linear)


@cache
def operation() -> Any:
    """Indices (C_out, C_in) and a table to weights, which torch.export leaves whole, and coremltools knows."""
    import numpy as np
    import torch

    converter()  # the whole of it, before a part
    from coremltools.converters.mil import Builder, register_torch_op

    @torch.library.custom_op(LOOK_UP, mutates_args=(), schema="(Tensor indices, Tensor table) -> Tensor")
    def look_up(indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table[indices.long()]

    @look_up.register_fake
    def _(indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table.new_empty(indices.shape)

    def castling_look_up(context: Any, node: Any) -> None:
        indices, table = (context[name].val for name in node.inputs)
        bytes_, shape = packed(indices, len(table).bit_length() - 1), np.array(indices.shape, np.uint32)
        context.add(Builder.constexpr_lut_to_dense(indices=bytes_, lut=table, shape=shape, name=node.name))

    register_torch_op(castling_look_up, torch_alias=[LOOK_UP, LOOK_UP.replace("::", ".")])
    return look_up


def packed(indices: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Indices of so many bits one after another in bytes, the lowest bit first, as MIL has them."""
    import numpy as np

    each = np.unpackbits(indices.astype(np.uint8).reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(each, bitorder="little")
