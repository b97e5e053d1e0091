"""How the operations of a program add up: the one thing about its arithmetic that a program does not say.

An accelerator may keep a running sum in float32 or in float16. `Float32Sums` is the first; `Float16Sums` is the
harshest form of the second, one term after another, so that a real device lies between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from castling_deploy.export.mil_shape_ops import UnsupportedOpError

if TYPE_CHECKING:
    from torch import Tensor


class Sums(Protocol):
    """Sums of products and of terms. Tensors come and go in float32."""

    def total(self, x: Tensor, axes: list[int]) -> Tensor:
        """The sum of x over `axes`, which stay as axes of size 1."""

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., M, K) @ (..., K, N) -> (..., M, N)."""

    def conv(self, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
        """Unpadded convolution of x (B, C, *d) with weight (C_out, C / groups, *k)."""


class Float32Sums:
    """Running sums in float32."""

    def total(self, x: Tensor, axes: list[int]) -> Tensor:
        return x.sum(axes, keepdim=True, dtype=x.dtype)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    def conv(self, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
        from torch.nn import functional as F

        convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return convolution(x, weight, None, stride, 0, dilation, groups)


class Float16Sums:
    """Running sums in float16: products are exact, the sum is rounded after every term that is added."""

    def total(self, x: Tensor, axes: list[int]) -> Tensor:
        import torch

        kept = [axis for axis in range(x.dim()) if axis not in axes]
        terms = _rounded(x.permute(*kept, *axes).flatten(len(kept)))  # (*kept, K)
        running = torch.zeros_like(terms[..., 0])
        for index in range(terms.shape[-1]):
            running = _rounded(running + terms[..., index])
        return running.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        import torch

        y = y.contiguous()
        running = torch.zeros(torch.broadcast_shapes(x[..., :1].shape, y[..., :1, :].shape))
        stored = running.half()
        for index in range(x.shape[-1]):
            stored.copy_(running.addcmul_(x[..., :, index, None], y[..., None, index, :]))
            running.copy_(stored)
        return running

    def conv(self, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
        from torch.nn import functional as F

        if x.dim() != 4:
            raise UnsupportedOpError("float16 sums of a convolution are covered in two dimensions only")
        kernel = list(weight.shape[2:])
        columns = F.unfold(x, tuple(kernel), tuple(dilation), 0, tuple(stride)).unflatten(1, (groups, -1))
        rows = weight.flatten(1).unflatten(0, (groups, -1))  # (G, C_out / G, K)
        height, width = (
            (size - (taps - 1) * gap - 1) // step + 1
            for size, taps, gap, step in zip(x.shape[2:], kernel, dilation, stride, strict=True)
        )
        return self.matmul(rows, columns).flatten(1, 2).unflatten(2, (height, width))


def _rounded(x: Tensor) -> Tensor:
    return x.half().float()
