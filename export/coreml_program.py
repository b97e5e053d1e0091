"""From a network to an ML Program: the interface that an app meets, torch.export, coremltools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError
from castling_deploy.export.channel_norm import teach_channel_norm
from castling_deploy.export.channels_first import Layout, in_channels_first
from castling_deploy.export.coreml_palette import teach_look_up
from castling_deploy.export.coremltools_parts import converter
from castling_deploy.export.scopes import REDUCTIONS, inside, kind, module_stack
from castling_deploy.export.torch_int8 import in_8_bits
from castling_deploy.target import Network, Precision

if TYPE_CHECKING:
    import torch
    from torch import nn

INTERFACE = "network"  # the network's name in what is exported
WIDE = 32  # a debug handle


def exported_program(
    network: Network, *, pixels: bool, scores: bool, layout: Layout = "channels-last"
) -> torch.export.ExportedProgram:
    """The graph that coremltools is handed, in the dialect it takes. Raises ExportError."""
    import torch

    try:
        with torch.no_grad():
            exported = torch.export.export(interface(network, pixels=pixels, scores=scores), network.example())
            program = exported.run_decompositions({})
    except Exception as error:  # torch.export raises errors of a dozen classes, most of them private
        raise ExportError(f"torch.export refuses the network: {error}") from error
    return in_channels_first(program) if layout == "channels-first" else program


def interface(network: Network, *, pixels: bool, scores: bool) -> nn.Module:
    """The network between what an app has and what it wants.

    `pixels`: takes them raw, (1, C, H, W) in 0..255, and normalises them itself. `scores`: returns the softmax of the
    logits beside the logits.
    """
    import torch
    from torch import nn

    class Interface(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.module
            if network.quantisation is not None:
                self.network = in_8_bits(network.module, network.quantisation)
            mean, std = (
                255 * torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)
                for values in (network.preprocessing.mean, network.preprocessing.std)
            )
            self.mean, self.std = nn.Buffer(mean.float()), nn.Buffer(std.float())

        def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
            if pixels:
                # (x / 255 - mean) / std, multiplied out: two operations, in float16 off by 0.0005 on average, as the
                # three are. As operations, because ct.ImageType has a bias per channel but one scale for all.
                image = (image - self.mean) / self.std
            logits: torch.Tensor = self.network(image)
            return (logits, logits.softmax(-1)) if scores else logits

    return Interface().eval()


def converted(
    program: torch.export.ExportedProgram,
    network: Network,
    precision: Precision,
    *,
    pixels: bool,
    outputs: tuple[str, ...],
) -> tuple[Any, frozenset[str]]:
    """The program as coremltools' MLModel, float32 at its interface, and the names of the operations that are in
    float32 besides because the network cannot do without. Raises ExportError."""
    import numpy as np

    ct = converter()
    if network.quantisation is not None and network.quantisation.palette is not None:
        teach_look_up()
    teach_channel_norm()

    (spec,) = network.inputs
    colours = ct.colorlayout.GRAYSCALE if spec.shape[1] == 1 else ct.colorlayout.RGB
    given = (
        ct.ImageType(name=spec.name, shape=spec.shape, color_layout=colours)
        if pixels
        else ct.TensorType(name=spec.name, shape=spec.shape, dtype=np.float32)
    )
    mark_wide(program, network)
    try:
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
            compute_precision=(
                ct.transform.FP16ComputePrecision(lambda operation: not is_wide(operation))
                if precision is not Precision.FP32
                else ct.precision.FLOAT32
            ),
            inputs=[given],
            outputs=[ct.TensorType(name=name, dtype=np.float32) for name in outputs],
        )
    except Exception as error:  # ValueError, NotImplementedError, RuntimeError, AssertionError, ...
        raise ExportError(f"coremltools refuses the network: {error}") from error
    operations = model._mil_program.functions["main"].operations  # 9.0: what was written, with its scopes
    return model, frozenset(operation.name for operation in operations if is_wide(operation))


def mark_wide(program: torch.export.ExportedProgram, network: Network) -> None:
    """Mark the nodes that stay in float32 in a float16 program: those of the network's islands and reductions.

    coremltools carries one number from a node of torch's graph to the operations that it makes of it, through all its
    passes: the debug handle. It has no room for a module's path.
    """
    for node in program.graph.nodes:
        path = module_stack(node)[-1].removeprefix(INTERFACE).removeprefix(".")
        reduces = kind(node) in REDUCTIONS and path in network.reductions
        if node.op == "call_function" and (reduces or inside(path, network.islands)):
            node.meta["debug_handle"] = WIDE


def is_wide(operation: Any) -> bool:
    """Whether an operation of coremltools was made of a node that is marked."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    return WIDE in operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, ())
