"""A network becomes a Core AI program, the same bytes in every process."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError, ShapeError
from castling_deploy.export.channel_norm import CHANNEL_NORM
from castling_deploy.export.channels_first import Layout, in_channels_first
from castling_deploy.export.coreai_norm import channel_normed
from castling_deploy.export.coreai_palette import RESOURCE, looked_up
from castling_deploy.export.half_network import in_half
from castling_deploy.export.scopes import REDUCTIONS, inside, kind, module_stack
from castling_deploy.export.torch_int8 import in_8_bits
from castling_deploy.export.torch_palette import LOOK_UP
from castling_deploy.target import Network, Precision

if TYPE_CHECKING:
    import torch

FUNCTION = "main"  # the entry point that coreai-torch gives a program
NETWORK = "network"  # the network's name inside what `in_half` returns
PRODUCTS = frozenset({"addmm", "baddbmm", "bmm", "convolution", "linear", "matmul", "mm"})  # torch's, decomposed
CAST = "_to_copy"
DEQUANTISE = "quantized_decomposed::dequantize_per_channel.default"
NORMS = frozenset({"layer_norm", "native_layer_norm"})  # coreai-torch computes their statistics in float32 anyway


@dataclass(frozen=True)
class Wide:
    """What a float16 program may have in float32: products, those of the islands, and casts, all that it has."""

    products: int = 0
    casts: int = 0


def exported_program(
    network: Network, precision: Precision, layout: Layout = "channels-last"
) -> torch.export.ExportedProgram:
    """What torch.export sees, with what Core AI knows as one operation left whole. Raises ShapeError, ExportError."""
    import torch
    from coreai_torch import get_decomp_table

    for spec in (*network.inputs, *network.outputs):
        if min(spec.shape) < 1:
            raise ShapeError(
                f"'{spec.name}' has the shape {spec.shape}, and this target writes fixed shapes",
                hint="give every axis a size: --batch-size, --imgsz",
            )
    module, half = network.module, precision is not Precision.FP32
    if network.quantisation is not None:
        module = in_8_bits(module, network.quantisation)
    if half:
        module = in_half(module, network.islands)
    try:
        with torch.no_grad():
            program = torch.export.export(module, network.example())
            if layout == "channels-first":
                program = in_channels_first(program.run_decompositions({}))
            program = program.run_decompositions(get_decomp_table())
    except Exception as error:  # torch.export raises errors of a dozen classes, most of them private
        raise ExportError(f"torch.export refuses the network: {error}") from error
    if half:
        widen_reductions(program.graph_module, network.reductions)
        with_affine_norms(program.graph_module)
    return program


def widen_reductions(graph: torch.fx.GraphModule, paths: Sequence[str]) -> None:
    """Let sums, means and norms of the modules at `paths` be float32 between casts, in place."""
    import torch

    cast = torch.ops.aten._to_copy.default
    for node in list(graph.graph.nodes):
        name = kind(node) if node.op == "call_function" else ""
        if name not in REDUCTIONS - NORMS or path_of(node) not in paths or node.meta["val"].dtype != torch.float16:
            continue
        (given, *_) = node.all_input_nodes
        with graph.graph.inserting_before(node):
            wide = graph.graph.call_function(cast, (given,), {"dtype": torch.float32})
        node.replace_input_with(given, wide)
        with graph.graph.inserting_after(node):
            back = graph.graph.call_function(cast, (node,), {"dtype": torch.float16})
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        for made, like, dtype in (
            (wide, given, torch.float32),
            (back, node, torch.float16),
            (node, node, torch.float32),
        ):
            made.meta = {**node.meta, "val": like.meta["val"].to(dtype)}
    graph.recompile()


def path_of(node: torch.fx.Node) -> str:
    """The module that a node of a float16 program is from, by its path in the network."""
    return module_stack(node)[-1].removeprefix(NETWORK).removeprefix(".")


def wide_in(program: torch.export.ExportedProgram, islands: Sequence[str]) -> Wide:
    """What the Core AI program made of this float16 one may have in float32."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return Wide(
        sum(kind(node) in PRODUCTS and inside(path_of(node), islands) for node in calls),
        sum(kind(node) == CAST for node in calls),
    )


def with_affine_norms(graph: torch.fx.GraphModule) -> None:
    """Give float16 LayerNorms whose scale and bias were folded away both again, as ones and zeros, in place.

    coreai-torch 0.4.3 gives a LayerNorm without them float32 ones and zeros, and float32 leaves the Neural Engine;
    in an island, where they are right, none is given.
    """
    import torch

    for node in list(graph.graph.nodes):
        if node.op != "call_function" or kind(node) != "native_layer_norm" or node.args[2] is not None:
            continue
        given, shape = node.args[0].meta["val"], list(node.args[1])
        if given.dtype != torch.float16:
            continue
        for place, number in ((2, 1.0), (3, 0.0)):
            with graph.graph.inserting_before(node):
                made = graph.graph.call_function(torch.ops.aten.full.default, (shape, number), {"dtype": given.dtype})
            made.meta = {**node.meta, "val": given.new_full(shape, number)}
            node.update_arg(place, made)
    graph.recompile()


def converted(program: torch.export.ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """The program as coreai's AIProgram, its inputs and outputs named. Raises ExportError."""
    from coreai_torch import TorchConverter

    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    converter.register_torch_lowering(DEQUANTISE)(dequantised)
    converter.register_torch_lowering(f"{CHANNEL_NORM}.default")(channel_normed)
    converter.register_torch_lowering(f"{LOOK_UP}.default")(partial(looked_up, program))
    try:
        converter.add_exported_program(program, input_names=inputs, output_names=outputs)
        return reproducible(converter.to_coreai())
    except Exception as error:  # ValueError, NotImplementedError, RuntimeError, MLIRError, ...
        raise ExportError(f"coreai-torch refuses the network: {error}") from error


def dequantised(values: Mapping[str, Any], node: torch.fx.Node, location: Any) -> Any:
    """int8 weights with a scale per output channel, as the operation that Core AI has for weights in blocks.

    coreai-torch 0.4.3 lowers to it from an operation of its own alone, which one of its private modules defines.
    """
    import numpy as np
    from coreai._compiler.dialects import coreai

    levels, scales, *_ = node.all_input_nodes
    column = [len(scales.meta["val"]), *[1] * (levels.meta["val"].dim() - 1)]
    before, after = np.zeros(column, np.int8), np.zeros(column, str(scales.meta["val"].dtype).removeprefix("torch."))
    scale = coreai.reshape(values[scales.name], column)
    return coreai.blockwise_shift_scale(values[levels.name], scale, before, after, loc=location)


def reproducible(program: Any) -> Any:
    """The same program without source locations, its private graphs and its weights numbered in their order.

    coreai-core 1.0.0b3 names graphs with random letters and weights with a hash that differs from process to process,
    and locations are paths of this machine. MLIR's text can be read back without loss: weights are hexadecimal.
    """
    from coreai._compiler.ir import Module
    from coreai.authoring import AIProgram

    module = program._module._mlir_module
    text: str = module.operation.get_asm(enable_debug_info=False)
    text = numbered(text, rf"resource_\d{{5,}}|{RESOURCE}(?:_\d+)?", "weight")
    for stem in sorted(set(re.findall(r"coreai\.graph private [^@]*@(\w+)_[a-z]{8}\(", text))):
        text = numbered(text, rf"(?<=@){stem}_[a-z]{{8}}\b", stem)
    return AIProgram._from_mlir_module(Module.parse(text, context=module.context))


def numbered(text: str, pattern: str, stem: str) -> str:
    """`text` with every different match of `pattern` called `stem`_0, `stem`_1, ... in the order of appearance."""
    names: dict[str, str] = {}
    return re.sub(pattern, lambda match: names.setdefault(match[0], f"{stem}_{len(names)}"), text)
