"""Palettised Linears on their way to Core ML: the look-up that our operation becomes in MIL.

Before iOS 18, Core ML has one table for a whole weight: none for a group of channels, and no scales beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from castling_deploy.export.coremltools_parts import converter
from castling_deploy.export.torch_palette import LOOK_UP
from castling_deploy.palette import packed


@cache
def teach_look_up() -> None:
    """Let coremltools know our operation, once in a process."""
    import numpy as np

    converter()  # the whole of it, before a part
    from coremltools.converters.mil import Builder, register_torch_op

    def castling_look_up(context: Any, node: Any) -> None:
        indices, table = (context[name].val for name in node.inputs)
        bytes_, shape = packed(indices, len(table).bit_length() - 1), np.array(indices.shape, np.uint32)
        context.add(Builder.constexpr_lut_to_dense(indices=bytes_, lut=table, shape=shape, name=node.name))

    register_torch_op(castling_look_up, torch_alias=[LOOK_UP, LOOK_UP.replace("::", ".")])
