"""LayerNorms of channels behind the batch: torch has those of the last axes alone, Core ML and Core AI of any."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from castling_deploy.export.coremltools_parts import converter

if TYPE_CHECKING:
    from torch import Tensor

CHANNEL_NORM = "castling::layer_norm"  # a reduction to who looks for those by their names


@cache
def channel_norm() -> Any:
    """LayerNorm over the second axis of (B, C, 1, N), weight and bias (C,), one operation to converters."""
    import torch

    @torch.library.custom_op(
        CHANNEL_NORM, mutates_args=(), schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor"
    )
    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        normed = torch.nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps)
        return normed.movedim(-1, 1).contiguous()

    @layer_norm.register_fake
    def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return x.new_empty(x.shape)

    return torch.ops.castling.layer_norm.default


@cache
def teach_channel_norm() -> None:
    """Let coremltools know our operation, once in a process."""
    import numpy as np

    converter()  # the whole of it, before a part
    from coremltools.converters.mil import Builder, register_torch_op

    def castling_layer_norm(context: Any, node: Any) -> None:
        *tensors, eps = node.inputs
        x, gamma, beta = (None if name is None else context[name] for name in tensors)
        normed = Builder.layer_norm(x=x, axes=[1], gamma=gamma, beta=beta, epsilon=np.float32(eps), name=node.name)
        context.add(normed)

    register_torch_op(castling_layer_norm, torch_alias=[CHANNEL_NORM, CHANNEL_NORM.replace("::", ".")])
