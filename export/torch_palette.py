"""Palettised Linears in torch, by an operation of our own that torch.export leaves whole and converters are taught."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from castling_deploy.palette import palettised

if TYPE_CHECKING:
    from torch import Tensor, nn

LOOK_UP = "castling::look_up"


def palettised_linear(bits: int) -> Callable[[nn.Linear], nn.Module]:
    """What makes of a float32 Linear one that looks its weight up in a table, by an index of so many bits."""
    import torch
    from torch import nn

    look_up = operation()

    class Linear(nn.Module):
        """Shape: (..., C_in) -> (..., C_out)."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            indices, table = map(torch.from_numpy, palettised(linear.weight.detach().numpy(), bits))
            self.indices, self.table, self.bias = nn.Buffer(indices), nn.Buffer(table.float()), linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, look_up(self.indices, self.table), self.bias)

    return Linear


@cache
def operation() -> Any:
    """Indices (C_out, C_in) in uint8 and a table (2**bits,) to weights (C_out, C_in) of the table's type."""
    import torch

    @torch.library.custom_op(LOOK_UP, mutates_args=(), schema="(Tensor indices, Tensor table) -> Tensor")
    def look_up(indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table[indices.long()]

    @look_up.register_fake
    def _(indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table.new_empty(indices.shape)

    return look_up
