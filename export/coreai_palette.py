"""Palettised Linears on their way to Core AI: the look-up that our operation becomes there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from castling_deploy.palette import packed

if TYPE_CHECKING:
    import torch

RESOURCE = "castling_indices"  # MLIR numbers those after the first: castling_indices_1
ALIGNMENT = 16  # of a constant's bytes, as coreai-core gives all of its own


def looked_up(
    program: torch.export.ExportedProgram, values: Mapping[str, Any], node: torch.fx.Node, location: Any
) -> Any:
    """Indices (C_out, C_in) or (C_out, C_in, 1, 1) in 4, 6 or 8 bits each, packed, and one table for the whole weight.

    numpy has no type for less than a byte, and coreai.constant of coreai-core 1.0.0b3 makes a byte of each index. So
    its bytes are handed to MLIR with their type. coreai-torch 0.4.3 does it too, for an operation of its own alone,
    with the tensors of one of its private modules.
    """
    import numpy as np
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import DenseResourceElementsAttr, IntegerType, RankedTensorType

    indices, table = node.all_input_nodes
    shape = list(indices.meta["val"].shape)
    (source,) = (indices, *indices.all_input_nodes)[-1:]  # a kernel's are a Linear's in another shape
    held = program.state_dict[program.graph_signature.inputs_to_buffers[source.name]].numpy()
    entries = len(table.meta["val"])
    bits = entries.bit_length() - 1
    kind = RankedTensorType.get(shape, IntegerType.get_unsigned(bits))
    data = DenseResourceElementsAttr.get_from_buffer(packed(held, bits).tobytes(), RESOURCE, kind, alignment=ALIGNMENT)
    constant = coreai.ConstantOp(value=data, loc=location).result  # type: ignore[no-untyped-call]
    whole = coreai.reshape(values[table.name], [*[1] * len(shape), entries, 1])  # one group by axis, single numbers
    return coreai.lut_to_dense(constant, whole, np.array(0, np.int16), loc=location)
