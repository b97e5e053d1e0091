"""Defects that exports really have, planted into a network before it is handed to an exporter.

Those on the folded network stand for what goes wrong in a toolchain or in an app's preprocessing, those on the trained
one for what goes wrong in a fold. Every one changes its argument in place where it can: hand it a copy (`deep`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.fold import fold
from castling_deploy.models.attention import FoldedAttention
from castling_deploy.models.mvit_attention import FoldedPoolingAttention, Pooled
from castling_deploy.rewrite import copied

Defect = Callable[[nn.Module], nn.Module]
LEVIT, DEIT = "castling-levit-digits", "castling-deit-digits"


def deep(network: nn.Module) -> nn.Module:
    """A copy whose tensors may be changed."""
    twin = copied(network)
    for parameter in twin.parameters():
        parameter.data = parameter.data.clone()
    return twin


def attention(network: nn.Module, index: int = 1) -> FoldedAttention | FoldedPoolingAttention:
    kinds = (FoldedAttention, FoldedPoolingAttention)
    return [module for module in network.modules() if isinstance(module, kinds)][index]


def linear(part: nn.Linear | Pooled) -> nn.Linear:
    """The projection of queries, keys or values, pooled after it or not."""
    return part.linear if isinstance(part, Pooled) else part


def swapped_query_and_key(network: nn.Module) -> nn.Module:
    module = attention(network)
    module.query, module.key = module.key, module.query
    return network


def dropped_bias(network: nn.Module) -> nn.Module:
    linear(attention(network).value).bias = None
    return network


def reversed_token_convolution(network: nn.Module) -> nn.Module:
    module = attention(network).dconv
    module.weight.data = module.weight.data.flip(2)
    return network


def dropped_token_convolution(network: nn.Module) -> nn.Module:
    attention(network).dconv.weight.data.zero_()
    return network


def heads_split_in_the_wrong_order(network: nn.Module) -> nn.Module:
    """Rows taken as (channel, head) where they are (head, channel)."""
    module = attention(network)
    heads = module.dconv.weight.shape[0]
    for layer in (linear(module.query), linear(module.key)):
        layer.weight.data = layer.weight.data.unflatten(0, (heads, -1)).transpose(0, 1).flatten(0, 1)
    return network


def constant_lost(network: nn.Module) -> nn.Module:
    """The kernel's 1 / pi taken for 1: the values weigh too little."""
    module = attention(network)
    value = module.value.norm if isinstance(module.value, Pooled) else module.value
    value.weight.data *= 1 / torch.pi
    value.bias.data *= 1 / torch.pi
    module.dconv.weight.data *= torch.pi
    module.register_forward_hook(lambda module, inputs, output: output * 1.05)
    return network


class Before(nn.Module):
    """Something done to the input first."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor], network: nn.Module) -> None:
        super().__init__()
        self.change, self.network = change, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(self.change(x))


def bgr(network: nn.Module) -> nn.Module:
    return Before(lambda x: x.flip(1), network)


def wrong_mean(network: nn.Module) -> nn.Module:
    return Before(lambda x: x + 0.02, network)


def wrong_std(network: nn.Module) -> nn.Module:
    return Before(lambda x: x * 1.02, network)


def divided_by_255_twice(network: nn.Module) -> nn.Module:
    return Before(lambda x: x / 255, network)


def crop_off_by_one(network: nn.Module) -> nn.Module:
    return Before(lambda x: x.roll(1, dims=3), network)


def height_and_width_exchanged(network: nn.Module) -> nn.Module:
    return Before(lambda x: x.transpose(2, 3), network)


def clipped_activations(network: nn.Module) -> nn.Module:
    """What an int8 range that is too small by two does to the inputs of a layer."""
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(-0.5, 0.5),))
    return network


def one_row_of_one_weight_zero(network: nn.Module) -> nn.Module:
    [module for module in network.modules() if isinstance(module, nn.Linear)][5].weight.data[3] = 0
    return network


class TanhGelu(nn.Module):
    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def tanh_gelu(network: nn.Module) -> nn.Module:
    for block in network.blocks:  # type: ignore[union-attr]
        block.mlp = TanhGelu(block.mlp.fc1, block.mlp.fc2)
    return network


def one_block_missing(network: nn.Module) -> nn.Module:
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    blocks = [each for each in lists if hasattr(each[-1], "attn")][-1]
    del blocks[-2]  # the last one is made for the tokens that the head reads
    return network


def read_as_channels_last(network: nn.Module) -> nn.Module:
    """The bytes of (B, H, W, C) taken for (B, C, H, W)."""
    return Before(lambda x: x.permute(0, 2, 3, 1).reshape(x.shape), network)


def resized_by_another_kernel(network: nn.Module) -> nn.Module:
    """What bilinear resizing instead of bicubic does to the pixels: a little blur."""

    def blurred(x: torch.Tensor) -> torch.Tensor:
        kernel = torch.tensor([0.05, 0.9, 0.05], dtype=x.dtype)
        weight = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
        return nn.functional.conv2d(padded, weight, groups=x.shape[1])

    return Before(blurred, network)


def pixels_off_by_one_level(network: nn.Module) -> nn.Module:
    """Rounding of the resized pixels down instead of to the nearest: half a level of 255, all one way."""
    return Before(lambda x: x - 1 / 255 / 0.5, network)


def saturated_half(network: nn.Module) -> nn.Module:
    """One layer's weights beyond the range of what stores them, cut off there."""
    layer = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][2]
    bound = layer.weight.detach().abs().max().item() / 2
    layer.weight.data.clamp_(-bound, bound)
    return network


def stale_scale(network: nn.Module) -> nn.Module:
    """One channel of one weight, multiplied by the scale that another calibration gave it."""
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][3]
    layer.weight.data[1] *= 1.5
    return network


def scale_off_by_two(network: nn.Module) -> nn.Module:
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][4]
    layer.weight.data *= 2
    return network


def outputs_shuffled(network: nn.Module) -> nn.Module:
    """The first two classes, or channels, of every output exchanged: labels that no longer fit."""

    def shuffled(module: nn.Module, inputs: object, outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        each = outputs if isinstance(outputs, tuple) else (outputs,)
        swapped = tuple(torch.cat([one[:, 1:2], one[:, :1], one[:, 2:]], 1) for one in each)
        return swapped if isinstance(outputs, tuple) else swapped[0]

    network.register_forward_hook(shuffled)
    return network


def normalisation_of_queries_lost(network: nn.Module) -> nn.Module:
    """Queries twice as long: visible only where nothing normalises them any more."""
    module = attention(network)
    layer = linear(module.query)
    layer.register_forward_hook(lambda module, inputs, output: output + 0.1)
    return network


def residual_missing(network: nn.Module) -> nn.Module:
    """One attention's output counted twice."""
    attention(network).register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


def rounded_to_bfloat16(network: nn.Module) -> nn.Module:
    """Weights with 8 bits where 24 were asked for: what a runtime's fast mode does unasked."""
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return network


def truncated_input(network: nn.Module) -> nn.Module:
    """The last rows of the picture black: a buffer that was too short."""
    return Before(lambda x: torch.cat([x[:, :, :-2], torch.full_like(x[:, :, -2:], -1)], 2), network)


def batchnorm_with_a_wrong_eps(trained: nn.Module) -> nn.Module:
    castled = deep(castle(trained))
    for module in castled.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eps = 1e-3
    return fold(castled)


def one_batchnorm_dropped(trained: nn.Module) -> nn.Module:
    castled = deep(castle(trained))
    norm = castled.get_submodule("stages.1.blocks.0.mlp.ln1.bn")
    norm.weight.data, norm.bias.data = torch.ones_like(norm.weight), torch.zeros_like(norm.bias)  # type: ignore[arg-type]
    return fold(castled)


def only_one_head(trained: nn.Module) -> nn.Module:
    castled = copied(castle(trained))
    castled.head_dist = castled.head
    return fold(castled)


ON_FOLDED = (
    swapped_query_and_key,
    dropped_bias,
    reversed_token_convolution,
    dropped_token_convolution,
    heads_split_in_the_wrong_order,
    constant_lost,
    bgr,
    wrong_mean,
    wrong_std,
    divided_by_255_twice,
    crop_off_by_one,
    height_and_width_exchanged,
    clipped_activations,
    one_row_of_one_weight_zero,
    one_block_missing,
    read_as_channels_last,
    resized_by_another_kernel,
    pixels_off_by_one_level,
    saturated_half,
    stale_scale,
    scale_off_by_two,
    outputs_shuffled,
    normalisation_of_queries_lost,
    residual_missing,
    rounded_to_bfloat16,
    truncated_input,
)
ON_DEIT = (tanh_gelu,)  # beside those on the folded network
ON_LEVIT = (batchnorm_with_a_wrong_eps, one_batchnorm_dropped, only_one_head)  # on the trained one
GROSS = (swapped_query_and_key, dropped_token_convolution, bgr, divided_by_255_twice)  # visible in float16 too
