"""The graphs that XNNPACK is handed inside a .pte file: operations, values and their types.

A payload is a header of 30 bytes (magic "XH00" at 4, offset and size of the graph as little-endian uint32 at 10 and
14: backends/xnnpack/serialization/xnnpack_graph_serialize.py of ExecuTorch 1.5) and a flatbuffer, which ExecuTorch's
own flatc turns into JSON by the schema that lies beside it.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError
from castling_deploy.palette import unpacked

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC, PLACE = b"XH00", struct.Struct("<II")
# XNNPACK's datatypes -> numpy's names; what is 8 bits wide in any of its schemes counts as int8
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int32": "int32", "pfp32": "float32"}
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int32": 32, "int8": 8, "int4": 4}
IN_LEVELS = ("PerChannelQuant", "PerChannelGroupQuant")
ZERO_OF_4_BITS = 8
INFINITE = re.compile(r"(?<=: )[+-]?(inf|nan)\b")  # bounds of activations: flatc writes what JSON has no word for
PRODUCTS = frozenset(
    {"XNNBatchMatrixMultiply", "XNNConv2d", "XNNConvTranspose2d", "XNNDepthwiseConv2d", "XNNFullyConnected"}
)


@dataclass(frozen=True)
class Levels:
    """A weight in levels: what they and its scales are called among the named data of the file.

    Every place on axis `channel` has a float32 scale, or every `group` of levels in a row a bfloat16 one.
    """

    name: str
    scales: str
    shape: tuple[int, ...]
    channel: int
    group: int | None

    def dequantised(self, named: Mapping[str, bytes]) -> npt.NDArray[np.float32]:
        """What they stand for. Raises KeyError and ValueError where the data are not there, or others."""
        import numpy as np

        data, scales = np.frombuffer(named[self.name], np.uint8), named[self.scales]
        if self.group is None:
            along = [-1 if axis == self.channel else 1 for axis in range(len(self.shape))]
            return data.view(np.int8).reshape(self.shape) * np.frombuffer(scales, np.float32).reshape(along)
        levels = unpacked(data, 4, math.prod(self.shape)).reshape(-1, self.group) - np.float32(ZERO_OF_4_BITS)
        steps = (np.frombuffer(scales, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return (levels * steps[:, None]).reshape(self.shape)


@dataclass(frozen=True)
class Payload:
    """Operations, products among them and bytes of constants, by numpy's name of the dtype of what they make."""

    operations: Counter[str]
    products: Counter[str]
    constant_bytes: Counter[str]
    levels: tuple[Levels, ...]


def read_payload(data: bytes) -> Payload:
    """The graph in a delegate's bytes. Raises ExportError where there is none."""
    if data[4:8] != MAGIC:
        raise ExportError("a delegate's payload is not XNNPACK's", hint="export the network again")
    graph = _decompiled(data[slice_of(data)])
    values, dtypes, constants, levels = {}, {}, Counter[str](), []
    keys = [item["named_key"] for item in graph["constant_data"]]
    for item in graph["xvalues"]:
        scheme = item["xvalue_union"]
        value = scheme.get("tensor_value", scheme)
        values[value["id_out"]] = value
        dtypes[value["id_out"]] = dtype = dtype_of(value["datatype"])
        if value["constant_buffer_idx"]:
            constants[dtype] += math.prod(value.get("dims", ())) * BITS.get(dtype, 0) // 8
            if scheme.get("quant_params_type") in IN_LEVELS:
                by = scheme["quant_params"]
                stored, scales = keys[value["constant_buffer_idx"]], keys[by["scale_buffer_idx"]]
                levels.append(Levels(stored, scales, tuple(value["dims"]), by["channel_dim"], by.get("group_size")))
    operations, products = Counter[str](), Counter[str]()
    for node in graph["xnodes"]:
        makes = dtypes[node["xnode_union"].get("output_id", node["xnode_union"].get("output1_id", 0))]
        operations[makes] += 1
        if node["xnode_union_type"] in PRODUCTS:
            weights = dtypes.get(node["xnode_union"].get("filter_id", -1), makes)
            products["int8" if weights in ("int8", "int4") else makes] += 1
    return Payload(operations, products, constants, tuple(levels))


def slice_of(data: bytes) -> slice:
    offset, size = PLACE.unpack_from(data, 10)
    return slice(offset, offset + size)


def dtype_of(datatype: str) -> str:
    """numpy's name for one of XNNPACK's datatypes, "xnn_datatype_fp16"."""
    name = datatype.removeprefix("xnn_datatype_")
    return DTYPES.get(name, "int4" if name.endswith("4") else "int8")


def _decompiled(flatbuffer: bytes) -> dict[str, Any]:
    from executorch.backends.xnnpack import serialization
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(flatbuffer)
        try:
            _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
            text = Path(folder, "graph.json").read_text(encoding="utf-8")
            graph: dict[str, Any] = json.loads(INFINITE.sub("null", text))
        except Exception as error:  # flatc's exit code as a RuntimeError, and what json says of its output
            raise ExportError(f"a delegate's graph cannot be read: {error}", hint="export the network again") from error
    return graph
