"""The operations of Core ML's MIL on image planes: pooling and resizing.

Part of `mil_ops`, under the same rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from castling_deploy.export.mil_shape_ops import Table, UnsupportedOpError, ints, padding

if TYPE_CHECKING:
    from torch import Tensor


def pools() -> Table:
    """Pooling windows."""
    from torch.nn import functional as F

    def window(
        x: Tensor, kernel: list[int], strides: Tensor | None, pad_type: str, pad: Tensor | None
    ) -> tuple[list[int], list[int]]:
        stride = [1] * len(kernel) if strides is None else ints(strides)
        around = padding(pad_type, pad, kernel, stride)
        if around[::2] != around[1::2]:
            raise UnsupportedOpError(f"the asymmetric padding {around} is not covered")
        return stride, around[::2]

    def max_pool(
        x: Tensor,
        kernel_sizes: Tensor,
        pad_type: str,
        strides: Tensor | None = None,
        pad: Tensor | None = None,
        ceil_mode: Tensor | bool = False,
    ) -> Tensor:
        kernel = ints(kernel_sizes)
        stride, around = window(x, kernel, strides, pad_type, pad)
        pooled: Tensor = getattr(F, f"max_pool{len(kernel)}d")(x, kernel, stride, around, ceil_mode=bool(ceil_mode))
        return pooled

    def avg_pool(
        x: Tensor,
        kernel_sizes: Tensor,
        pad_type: str,
        strides: Tensor | None = None,
        pad: Tensor | None = None,
        ceil_mode: Tensor | bool = False,
        exclude_padding_from_average: Tensor | bool = False,
    ) -> Tensor:
        kernel = ints(kernel_sizes)
        stride, around = window(x, kernel, strides, pad_type, pad)
        pooled: Tensor = getattr(F, f"avg_pool{len(kernel)}d")(
            x, kernel, stride, around, bool(ceil_mode), not exclude_padding_from_average
        )
        return pooled

    return {"avg_pool": avg_pool, "max_pool": max_pool}


def resizes() -> Table:
    """Resizing of the last two axes."""
    import torch

    def points(size: int, wanted: int, mode: str) -> Tensor:
        """Where `wanted` samples lie on a line of `size` elements (MIL, resize_bilinear, sampling_mode)."""
        steps = torch.arange(wanted, dtype=torch.float64)
        match mode:
            case "ALIGN_CORNERS" if wanted == 1:
                at = steps + (size - 1) / 2
            case "ALIGN_CORNERS" | "STRICT_ALIGN_CORNERS":
                at = steps * (size - 1) / max(wanted - 1, 1)
            case "DEFAULT":
                at = steps * size / wanted
            case "OFFSET_CORNERS":
                at = (steps + 0.5) * max(size - 1, 1) / wanted
            case "UNALIGN_CORNERS":
                at = (steps + 0.5) * size / wanted - 0.5
            case _:
                raise UnsupportedOpError(f"sampling_mode '{mode}' is not covered")
        return at.clamp(0, size - 1)

    def linear(x: Tensor, axis: int, wanted: int, mode: str) -> Tensor:
        at = points(x.shape[axis], wanted, mode)
        low = at.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        share = (at - low).float().reshape(-1, *[1] * (-1 - axis))
        return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share

    def bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
        return linear(linear(x, -2, height, mode), -1, width, mode)

    def nearest(x: Tensor, height: int, width: int) -> Tensor:
        for axis, wanted in ((-2, height), (-1, width)):
            x = x.index_select(axis, torch.arange(wanted) * x.shape[axis] // wanted)
        return x

    def scaled(x: Tensor, height: Tensor | int, width: Tensor | int) -> tuple[int, int]:
        # in float32, as MIL infers the shape: 5 * float32(1.4) is 7 there and 6.9999999 in float64
        return int(torch.as_tensor(height) * x.shape[-2]), int(torch.as_tensor(width) * x.shape[-1])

    def upsample_bilinear(
        x: Tensor,
        scale_factor_height: Tensor | int = 1,
        scale_factor_width: Tensor | int = 1,
        align_corners: Tensor | bool = True,
        half_pixel_centers: Tensor | bool | None = None,
    ) -> Tensor:
        if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
            raise UnsupportedOpError("half_pixel_centers equal to align_corners is not covered")
        return bilinear(
            x,
            *scaled(x, scale_factor_height, scale_factor_width),
            "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS",
        )

    def upsample_nearest(
        x: Tensor, scale_factor_height: Tensor | int = 1, scale_factor_width: Tensor | int = 1
    ) -> Tensor:
        return nearest(x, *scaled(x, scale_factor_height, scale_factor_width))

    def resize_bilinear(
        x: Tensor,
        target_size_height: Tensor | int = 1,
        target_size_width: Tensor | int = 1,
        sampling_mode: str = "DEFAULT",
    ) -> Tensor:
        return bilinear(x, int(target_size_height), int(target_size_width), sampling_mode)

    def resize_nearest(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
        height, width = int(target_size_height), int(target_size_width)
        if height % x.shape[-2] or width % x.shape[-1]:
            raise UnsupportedOpError("only whole multiples are covered: MIL does not say which neighbour is nearest")
        return nearest(x, height, width)

    return {
        "resize_bilinear": resize_bilinear,
        "resize_nearest_neighbor": resize_nearest,
        "upsample_bilinear": upsample_bilinear,
        "upsample_nearest_neighbor": upsample_nearest,
    }
