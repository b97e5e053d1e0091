"""LayerNorms of channels behind the batch, on their way to Core AI: coreai-torch has those of the last axes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def channel_normed(values: Mapping[str, Any], node: torch.fx.Node, location: Any) -> Any:
    """`channel_norm` as Core AI's composite `layer_norm` over axis 1, with the statistics in float32.

    As in coreai-torch 0.4.3, weight and bias have the shape of the axes, (C,), and are never left out.
    """
    import numpy as np
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import F32Type
    from coreai_torch import generate_composite_decl

    arguments: tuple[Any, ...] = node.args
    given, *affine, eps = arguments
    x = values[given.name]
    kind, channels = x.type.element_type, x.type.shape[1]
    gamma, beta = (
        coreai.constant(np.full(channels, fill), dtype=kind) if one is None else values[one.name]
        for one, fill in zip(affine, (1, 0), strict=True)
    )
    attributes = {"eps": eps, "axes": [1], "version": 1}
    declared = generate_composite_decl(x.context, "layer_norm", ["input", "gamma", "beta"], ["output"], attributes)

    @coreai.graph(private=True, no_inline=True, composite_decl=declared)
    def layer_norm(input: Any, gamma: Any, beta: Any) -> Any:
        wide = coreai.cast(input, F32Type.get())
        centred = coreai.broadcasting_sub(wide, coreai.reduce_mean(wide, [1]))
        variance = coreai.reduce_mean(coreai.broadcasting_mul(centred, centred), [1])
        scale = coreai.rsqrt(coreai.broadcasting_add(variance, coreai.constant(np.float32(eps))))
        normed = coreai.cast(coreai.broadcasting_mul(centred, scale), kind)
        weight, bias = (coreai.reshape(one, [channels, 1, 1]) for one in (gamma, beta))
        return coreai.broadcasting_add(coreai.broadcasting_mul(normed, weight), bias)

    (normed,) = layer_norm(x, gamma, beta)
    return normed
