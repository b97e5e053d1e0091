"""A network in float16, its islands in float32, as a torch module: for formats whose converter keeps torch's types."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError
from castling_deploy.export.scopes import inside

if TYPE_CHECKING:
    from torch import Tensor, nn


def in_half(module: nn.Module, islands: Sequence[str] = ()) -> nn.Module:
    """A copy with float16 weights and arithmetic that takes and returns float32.

    `islands` are paths of modules that stay in float32, everything in them included, between casts. They are hooked and
    not wrapped, so that a module that looks at its children finds what it expects, and paths remain as they are, below
    `network`. Raises ExportError for a path that the network has not.
    """
    from torch import nn

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(module)
            for path, part in self.network.named_modules():
                if not inside(path, islands):
                    part._apply(narrowed, recurse=False)
            for path in islands:
                widen(self.network, path)

        def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
            outputs = self.network(image.half())
            if isinstance(outputs, tuple):
                return tuple(output.float() for output in outputs)
            return outputs.float()

    return Half().eval()


def narrowed(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def widen(network: nn.Module, path: str) -> None:
    """Let the float32 module at `path` of a float16 network take float16 and return float16, in place."""
    import torch

    try:
        island = network.get_submodule(path)
    except AttributeError as error:
        raise ExportError(f"the network has no module '{path}' to keep in float32: {error}") from error

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return converted(args, torch.float32), converted(kwargs, torch.float32)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return converted(output, torch.float16)

    island.register_forward_pre_hook(before, with_kwargs=True)
    island.register_forward_hook(after)


def converted(value: Any, dtype: Any) -> Any:
    """`value` with every floating-point tensor in it, in tuples, lists and dictionaries too, in `dtype`."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(converted(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: converted(item, dtype) for key, item in value.items()}
    return value
