"""The operations of Core ML's MIL over torch: name -> function, with MIL's own parameter names and defaults.

Semantics are those that coremltools documents (converters/mil/mil/ops/defs, iOS15 to iOS18) and were checked against
torch, operation by operation (tests/export/test_mil_operations.py). Every tensor arrives as a torch tensor, constants
included, and float16 arrives as float32: what an operation does inside is float32, the evaluator rounds its result.
A parameter value that is not covered is an UnsupportedOpError, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from castling_deploy.export.mil_image_ops import pools, resizes
from castling_deploy.export.mil_shape_ops import (
    Table,
    UnsupportedOpError,
    choice,
    ints,
    layouts,
    padded,
    padding,
    per_channel,
    selections,
)
from castling_deploy.palette import unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from castling_deploy.export.mil_sums import Sums

DTYPES = {
    "bool": "bool",
    "fp16": "float16",
    "fp32": "float32",
    "int8": "int8",
    "uint8": "uint8",
    "int16": "int16",
    "uint16": "uint16",
    "int32": "int32",
}
UNARY = (
    "abs",
    "acos",
    "asin",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "exp2",
    "floor",
    "logical_not",
    "relu",
    "round",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "tan",
    "tanh",
)
BINARY = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "real_div": "true_divide",
    "floor_div": "floor_divide",
    "mod": "remainder",
    "pow": "pow",
    "maximum": "maximum",
    "minimum": "minimum",
    "equal": "eq",
    "not_equal": "ne",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "logical_and": "logical_and",
    "logical_or": "logical_or",
    "logical_xor": "logical_xor",
}


def operations(sums: Sums) -> Table:
    """Every operation this evaluator knows, adding up as `sums` does."""
    return {
        **_elementwise(),
        **_activations(),
        **_reductions(sums),
        **_normalisations(sums),
        **_products(sums),
        **pools(),
        **resizes(),
        **layouts(),
        **selections(),
    }


def _elementwise() -> Table:
    import torch

    def unary(name: str) -> Callable[[Tensor], Tensor]:
        function: Callable[[Tensor], Tensor] = getattr(torch, name)
        return lambda x: function(x)

    def binary(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        function: Callable[[Tensor, Tensor], Tensor] = getattr(torch, name)
        return lambda x, y: function(x, y)

    return {
        **{name: unary(name) for name in UNARY},
        **{name: binary(function) for name, function in BINARY.items()},
        "cast": lambda x, dtype: x.to(getattr(torch, DTYPES[dtype])),
        "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
        "identity": lambda x: x,
        "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
        "log": lambda x, epsilon=1e-45: (x + epsilon).log(),
        "rsqrt": lambda x, epsilon=1e-12: (x + epsilon).rsqrt(),
        "threshold": lambda x, alpha: torch.maximum(x, alpha),
    }


def _activations() -> Table:
    import torch
    from torch.nn import functional as F

    def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
        if mode == "SIGMOID_APPROXIMATION":
            return x * (1.702 * x).sigmoid()
        return F.gelu(x, approximate=choice(mode, {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}))

    def prelu(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * per_channel(alpha, x))

    return {
        "clamped_relu": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x).clamp(max=beta),
        "elu": lambda x, alpha: torch.where(x > 0, x, alpha * x.expm1()),
        "gelu": gelu,
        "leaky_relu": lambda x, alpha: torch.where(x >= 0, x, alpha * x),
        "linear_activation": lambda x, alpha, beta: alpha * x + beta,
        "prelu": prelu,
        "relu6": lambda x: x.clamp(0, 6),
        "scaled_tanh": lambda x, alpha, beta: alpha * (beta * x).tanh(),
        "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
        "silu": lambda x: x * x.sigmoid(),
        "softplus": lambda x: F.softplus(x),
        "softsign": lambda x: x / (1 + x.abs()),
        "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0.0),
    }


def _reductions(sums: Sums) -> Table:
    import torch

    def reduction(function: Callable[[Tensor, list[int]], Tensor]) -> Callable[..., Tensor]:
        def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
            over = [axis % x.dim() for axis in (range(x.dim()) if axes is None else ints(axes))]
            result = function(x, over)
            return result if keep_dims else result.squeeze(over)

        return reduce

    def argument(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def reduce(
            x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = "int32"
        ) -> Tensor:
            return function(x, int(axis), keepdim=bool(keep_dims)).to(getattr(torch, DTYPES[output_dtype]))

        return reduce

    def product(x: Tensor, axes: list[int]) -> Tensor:
        for axis in axes:
            x = x.prod(axis, keepdim=True)
        return x

    def log_sum_exp(x: Tensor, axes: list[int]) -> Tensor:
        peak = x.amax(axes, keepdim=True)
        return peak + sums.total((x - peak).exp(), axes).log()

    table: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
        "reduce_l1_norm": lambda x, axes: sums.total(x.abs(), axes),
        "reduce_l2_norm": lambda x, axes: sums.total(x.square(), axes).sqrt(),
        "reduce_log_sum": lambda x, axes: sums.total(x, axes).log(),
        "reduce_log_sum_exp": log_sum_exp,
        "reduce_max": lambda x, axes: x.amax(axes, keepdim=True),
        "reduce_mean": lambda x, axes: sums.total(x, axes) / math.prod(x.shape[axis] for axis in axes),
        "reduce_min": lambda x, axes: x.amin(axes, keepdim=True),
        "reduce_prod": product,
        "reduce_sum": lambda x, axes: sums.total(x, axes),
        "reduce_sum_square": lambda x, axes: sums.total(x.square(), axes),
    }
    return {
        **{name: reduction(function) for name, function in table.items()},
        "reduce_argmax": argument(torch.argmax),
        "reduce_argmin": argument(torch.argmin),
    }


def _normalisations(sums: Sums) -> Table:
    def standardised(x: Tensor, axes: list[int], epsilon: Tensor | float) -> Tensor:
        count = math.prod(x.shape[axis] for axis in axes)
        centred = x - sums.total(x, axes) / count
        return centred / (sums.total(centred.square(), axes) / count + epsilon).sqrt()

    def layer_norm(
        x: Tensor,
        axes: Tensor | None = None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        epsilon: Tensor | float = 1e-5,
    ) -> Tensor:
        over = [axis % x.dim() for axis in (range(x.dim()) if axes is None else ints(axes))]
        shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
        y = standardised(x, over, epsilon)
        y = y if gamma is None else y * gamma.reshape(shape)
        return y if beta is None else y + beta.reshape(shape)

    def affine(y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        y = y if gamma is None else y * per_channel(gamma, y)
        return y if beta is None else y + per_channel(beta, y)

    def batch_norm(
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        epsilon: Tensor | float = 1e-5,
    ) -> Tensor:
        y = (x - per_channel(mean, x)) / (per_channel(variance, x) + epsilon).sqrt()
        return affine(y, gamma, beta)

    def instance_norm(
        x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
    ) -> Tensor:
        return affine(standardised(x, list(range(2, x.dim())), epsilon), gamma, beta)

    def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
        return x / (sums.total(x.square(), [x.dim() - 3, x.dim() - 2, x.dim() - 1]) + epsilon).sqrt()

    def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
        over = int(axis) % x.dim()
        weights = (x - x.amax(over, keepdim=True)).exp()
        return weights / sums.total(weights, [over])

    return {
        "batch_norm": batch_norm,
        "instance_norm": instance_norm,
        "l2_norm": l2_norm,
        "layer_norm": layer_norm,
        "softmax": softmax,
    }


def _products(sums: Sums) -> Table:
    import torch
    from torch.nn import functional as F

    def matmul(x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False) -> Tensor:
        return sums.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = sums.matmul(x, weight.mT)
        return y if bias is None else y + bias

    def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
        shape = [1] * quantized_data.dim()
        shape[int(axis)] = -1
        return (quantized_data.float() - zero_point.reshape(shape)) * scale.reshape(shape)

    def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, shape: Tensor) -> Tensor:
        bits, sizes = len(lut).bit_length() - 1, ints(shape)
        found = unpacked(indices.numpy(), bits, math.prod(sizes))
        return lut[torch.from_numpy(found).long()].reshape(sizes)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scores = sums.matmul(query, key.mT) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return sums.matmul(weights / sums.total(weights, [weights.dim() - 1]), value)

    def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + per_channel(bias, y)

    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        strides: Tensor | None = None,
        pad_type: str = "valid",
        pad: Tensor | None = None,
        dilations: Tensor | None = None,
        groups: Tensor | int = 1,
    ) -> Tensor:
        ones = [1] * (x.dim() - 2)
        stride = ones if strides is None else ints(strides)
        dilation = ones if dilations is None else ints(dilations)
        reach = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
        around = padding(pad_type, pad, reach, stride)
        return with_bias(sums.conv(padded(x, around), weight, stride, dilation, int(groups)), bias)

    def conv_transpose(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        pad: Tensor | None = None,
        output_shape: Tensor | None = None,
        pad_type: str = "valid",
        strides: Tensor | None = None,
        dilations: Tensor | None = None,
        groups: Tensor | int = 1,
    ) -> Tensor:
        rank = x.dim() - 2
        stride = [1] * rank if strides is None else ints(strides)
        dilation = [1] * rank if dilations is None else ints(dilations)
        if pad_type not in ("valid", "custom"):
            raise UnsupportedOpError(f"pad_type '{pad_type}' is not covered")
        around = [0] * (2 * rank) if pad is None or pad_type == "valid" else ints(pad)
        full = getattr(F, f"conv_transpose{rank}d")(x, weight, None, stride, 0, 0, int(groups), dilation)
        crop = []  # negative padding crops
        for axis in range(rank):
            before, after = around[2 * axis], around[2 * axis + 1]
            size = full.shape[2 + axis] - before - after if output_shape is None else ints(output_shape)[2 + axis]
            crop += [-before, size + before - full.shape[2 + axis]]
        return with_bias(padded(full, crop), bias)

    return {
        "constexpr_affine_dequantize": constexpr_affine_dequantize,
        "constexpr_lut_to_dense": constexpr_lut_to_dense,
        "conv": conv,
        "conv_transpose": conv_transpose,
        "linear": linear,
        "matmul": matmul,
        "scaled_dot_product_attention": attention,
        "einsum": lambda values, equation: torch.einsum(equation, *values),
    }
