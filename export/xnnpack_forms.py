"""Operations that XNNPACK does not take, or not exactly, rewritten in those it takes. Exact in real arithmetic.

ExecuTorch 1.5 delegates Linear, but no norm, sum, select or strided slice (backends/xnnpack/partition/config). Every
such operation ends a delegate: Castling-DeiT-T takes 50 delegates and 97 operations outside, Castling-LeViT-128S 22 and
59. In these forms each is one delegate with nothing outside, and takes 0.82 and 0.95 of the time (median of 150
interleaved pairs, one thread of an AVX-512 EPYC, 224 pixels; minima 13.5 -> 11.0 ms and 4.1 -> 3.9 ms).

The forms are a decomposition table, as torch.export takes it: they know operations, not networks. A form answers
NotImplemented for a case that it does not cover, which leaves the operation as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from castling_deploy.export.binary16 import SMALLEST_NORMAL

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def in_xnnpack_forms(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` (ATen dialect) with the forms in place, and what does not depend on the image computed."""
    import torch
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    aten = torch.ops.aten
    forms: dict[Any, Callable[..., Tensor]] = {
        aten.layer_norm.default: layer_norm,
        aten.rms_norm.default: rms_norm,
        aten.linalg_vector_norm.default: vector_norm,
        aten.mean.dim: mean,
        aten.select.int: select,
        aten.slice.Tensor: strided_slice,
        aten.conv2d.default: column_conv,
        aten.mul.Tensor: scalar_product,
        aten.upsample_nearest2d.vec: nearest_doubling,
    }
    levels = torch.ops.quantized_decomposed
    # weights in 8 and 4 bits are constants too, and have to stay in them
    kept: set[Any] = {levels.dequantize_per_channel.default, levels.dequantize_per_channel_group.default}
    return constant_prop_pass(program.run_decompositions(forms), kept)


def weighted_sum(x: Tensor, weight: float, plus: float | None = None) -> Tensor:
    """weight * sum(x) + plus over the last axis, as a Linear with one output: (..., C) -> (..., 1)."""
    import torch

    bias = None if plus is None else torch.full((1,), plus, dtype=x.dtype)
    return torch.nn.functional.linear(x, torch.full((1, x.shape[-1]), weight, dtype=x.dtype), bias)


def in_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / s and s = sum|x| / sqrt(C) over the last axis: the square sum of x / s is in 1..C, whatever the size of x.

    In float16 the square of 256 is infinite and that of 2**-13 is zero. Without this, LeViT-128S with random weights
    gives infinite logits for a photograph of four times the contrast.
    """
    scale = weighted_sum(x.abs(), x.shape[-1] ** -0.5).clamp(min=SMALLEST_NORMAL)
    return x / scale, scale


def is_half(x: Tensor) -> bool:
    return x.dtype.itemsize == 2


def layer_norm(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    if len(normalized_shape) != 1:
        return NotImplemented
    x = rms_norm(x - weighted_sum(x, 1 / x.shape[-1]), normalized_shape, weight, eps)
    return x if bias is None else x + bias


def rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    import torch

    if len(normalized_shape) != 1 or eps is None:
        return NotImplemented
    share = 1 / x.shape[-1]
    if is_half(x):
        x, scale = in_range(x)
        root = torch.full((1,), eps**0.5, dtype=x.dtype) / scale  # (sqrt(eps) / s)^2 is eps / s^2
        square = weighted_sum(x * x, share) + root * root
    else:
        square = weighted_sum(x * x, share, plus=eps)
    x = x * square.rsqrt()
    return x if weight is None else x * weight


def vector_norm(
    x: Tensor, ord: float = 2, dim: list[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    if ord != 2 or dim is None or [axis % x.dim() for axis in dim] != [x.dim() - 1] or dtype is not None:
        return NotImplemented
    if is_half(x):
        x, scale = in_range(x)
        norm = weighted_sum(x * x, 1.0).sqrt() * scale
    else:
        norm = weighted_sum(x * x, 1.0).sqrt()
    return norm if keepdim else norm.reshape(norm.shape[:-1])


def mean(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    if dim is None or dtype is not None:
        return NotImplemented
    if len(dim) == 2:
        return mean_of_map(x, dim, keepdim)
    if len(dim) != 1:
        return NotImplemented
    axis = dim[0] % x.dim()
    average = weighted_sum(x.transpose(axis, -1), 1 / x.shape[axis]).transpose(axis, -1)
    return average if keepdim else average.reshape(without(axis, x.shape))


def mean_of_map(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    """The mean over height and width as two poolings, along the rows and then of what they give.

    XNNPACK's own adds a map value by value, and where all are alike every rounding goes to the same side: of a flat map
    of 52 x 52 it is off by 3e-5 of the mean, of 104 x 104 by 1.6e-4; in two steps by 3e-7 and 5e-7, PyTorch by 2e-7 and
    4e-7 (ExecuTorch 1.5.1). In float16 it adds in float32 already.
    """
    from torch.nn.functional import avg_pool2d

    axes = sorted(axis % x.dim() for axis in dim)
    if x.dim() != 4 or axes != [2, 3] or not keepdim or is_half(x) or 1 in x.shape[2:]:  # no pooling of 1 x 1 there
        return NotImplemented
    return avg_pool2d(avg_pool2d(x, (1, x.shape[3])), (x.shape[2], 1))


def select(x: Tensor, dim: int, index: int) -> Tensor:
    axis = dim % x.dim()
    return x.narrow(axis, index % x.shape[axis], 1).reshape(without(axis, x.shape))


def strided_slice(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    """x[start:end:step] along `dim`, as the first of every `step` entries: pad, split the axis in two, slice."""
    from torch.nn.functional import pad

    if step == 1:
        return NotImplemented
    axis = dim % x.dim()
    first, last, _ = slice(start, end).indices(x.shape[axis])
    x = x.narrow(axis, first, last - first)
    groups = -(-x.shape[axis] // step)
    x = pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, groups * step - x.shape[axis]])
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    return x.reshape(*before, groups, step, *after).narrow(axis + 1, 0, 1).reshape(*before, groups, *after)


def column_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """A depthwise convolution with a (K, 1) kernel, (B, C, N, W), every column a channel of its own: (B, C * W, N, 1).

    XNNPACK computes 16 channels at once with AVX-512, and the token convolution of DeiT-T has as many as heads, 3: this
    form alone saves 7 % of the network's time.
    """
    from torch.nn.functional import conv2d

    batch, channels, _, columns = x.shape
    if (
        not channels == groups == len(weight)
        or weight.shape[-1] != 1
        or columns == 1
        or bias is not None
        or stride[-1] != 1
        or padding[-1] != 0
    ):
        return NotImplemented
    x = x.transpose(2, 3).reshape(batch, channels * columns, -1, 1)
    x = conv2d(x, weight.repeat_interleave(columns, 0), None, stride, padding, dilation, channels * columns)
    return x.reshape(batch, channels, columns, -1).transpose(2, 3)


def nearest_doubling(x: Tensor, size: list[int] | None, scales: list[float] | None) -> Tensor:
    """Nearest-neighbour upsampling by two, as a transposed convolution with ones: PicoDet's neck in one delegate."""
    import torch

    if not scales or list(scales) != [2.0, 2.0]:
        return NotImplemented
    ones = torch.ones(x.shape[1], 1, 2, 2, dtype=x.dtype)
    return torch.nn.functional.conv_transpose2d(x, ones, stride=2, groups=x.shape[1])


def scalar_product(x: Tensor, other: Tensor | float) -> Tensor:
    """x times a number: ExecuTorch keeps the number in float32 and casts it, outside the delegate, at every run."""
    import torch

    if not (is_half(x) and isinstance(other, (int, float))):
        return NotImplemented
    return x * torch.full((1,), other, dtype=x.dtype)


def without(axis: int, shape: torch.Size) -> list[int]:
    return [*shape[:axis], *shape[axis + 1 :]]
