"""Small Core ML programs, from torch or written operation by operation, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import numpy.typing as npt
import torch
from coremltools.converters.mil import Builder as mb
from torch import nn

from castling_deploy.export.mil_evaluator import Program

PLANE = (2, 4, 8, 6)


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.layers)


def noise(*shapes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def saved(
    module: nn.Module, inputs: Sequence[torch.Tensor], folder: Path, precision: str = "FLOAT32", target: str = "iOS17"
) -> Path:
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs)).run_decompositions({})
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            skip_model_load=True,
            compute_precision=getattr(ct.precision, precision),
            inputs=[
                ct.TensorType(name=f"x{index}", shape=tuple(x.shape), dtype=np.float32)
                for index, x in enumerate(inputs)
            ],
        )
    model.save(str(folder / "one.mlpackage"))
    return folder / "one.mlpackage"


def built(body: Callable[..., Any], shapes: Sequence[Sequence[int]], folder: Path) -> Path:
    """A program written operation by operation with coremltools' own builder; `body` takes x0, x1, ..."""
    float32 = ct.converters.mil.mil.types.fp32
    program = mb.program(
        input_specs=[mb.TensorSpec(shape=tuple(shape), dtype=float32) for shape in shapes],
        opset_version=ct.target.iOS17,
    )(body)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT32,
    )
    model.save(str(folder / "one.mlpackage"))
    return folder / "one.mlpackage"


def run(program: Program, inputs: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
    return list(program({f"x{index}": x.numpy() for index, x in enumerate(inputs)}).values())  # type: ignore[arg-type]
