"""The operations of Core ML's MIL that move values rather than compute them: layouts and selections.

Part of `mil_ops`, under the same rules; also how arguments are read that all of its parts share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

Table = Mapping[str, Callable[..., Any]]


class UnsupportedOpError(ExportError):
    """The program has an operation, or a value of a parameter, that this evaluator does not know."""


def ints(x: Tensor) -> list[int]:
    """The elements of an integer tensor."""
    return [int(value) for value in x.flatten().tolist()]


def choice(value: str, known: Mapping[str, str]) -> str:
    """`known[value]`. Raises UnsupportedOpError."""
    if value not in known:
        raise UnsupportedOpError(f"'{value}' is none of {', '.join(known)}")
    return known[value]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...), which broadcasts against x (B, C, ...)."""
    return values.reshape(-1, *[1] * (x.dim() - 2))


def padded(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """x with its last len(pad) / 2 axes padded, (before, after) per axis, first axis first; negative crops."""
    from torch.nn import functional as F

    pairs = [tuple(pad[index : index + 2]) for index in range(0, len(pad), 2)]
    while pairs and pairs[0] == (0, 0):  # torch reflects the last axes only
        del pairs[0]
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], mode, value)


def padding(pad_type: str, pad: Tensor | None, reach: list[int], stride: list[int]) -> list[int]:
    """(before, after) per spatial axis of a window that reaches over `reach` elements. Raises UnsupportedOpError."""
    if pad_type == "valid":
        return [0] * (2 * len(reach))
    if pad_type == "custom":
        return [0] * (2 * len(reach)) if pad is None else ints(pad)
    if pad_type in ("same", "same_lower") and all(step == 1 for step in stride) and all(size % 2 for size in reach):
        return [size // 2 for size in reach for _ in range(2)]
    # An even reach or a stride: MIL's documentation and TensorFlow's "same" give different paddings.
    raise UnsupportedOpError(f"pad_type '{pad_type}' with reach {reach} and strides {stride} is not covered")


def layouts() -> Table:
    """Operations that only rearrange."""
    import torch

    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        # 0 takes over the size of x, allowed where the rank stays (MIL, reshape)
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(ints(shape))])

    def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.dim() + axes.numel()
        for axis in sorted(axis % rank for axis in ints(axes)):
            x = x.unsqueeze(axis)
        return x

    def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(ints(axes))

    def concat(values: Sequence[Tensor], axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
        if not interleave:
            return torch.cat(list(values), int(axis))
        along = int(axis) % values[0].dim()
        return torch.stack(list(values), along + 1).flatten(along, along + 1)

    def split(
        x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if split_sizes is not None:
            return x.split(ints(split_sizes), int(axis))
        assert num_splits is not None
        return x.split(x.shape[int(axis)] // int(num_splits), int(axis))

    def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
        return padded(
            x,
            ints(pad),
            choice(mode, {name: name for name in ("constant", "reflect", "replicate")}),
            float(constant_val) if mode == "constant" else 0.0,
        )

    def flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
        return x.reshape(x.shape[: int(axis)].numel(), -1)

    return {
        "concat": concat,
        "expand_dims": expand_dims,
        "flatten2d": flatten2d,
        "pad": pad,
        "reshape": reshape,
        "split": split,
        "squeeze": squeeze,
        "pixel_shuffle": lambda x, upscale_factor: torch.pixel_shuffle(x, int(upscale_factor)),
        "pixel_unshuffle": lambda x, downscale_factor: torch.pixel_unshuffle(x, int(downscale_factor)),
        "reverse": lambda x, axes=None: x.flip(list(range(x.dim())) if axes is None else ints(axes)),
        "stack": lambda values, axis: torch.stack(list(values), int(axis)),
        "tile": lambda x, reps: x.repeat(ints(reps)),
        "transpose": lambda x, perm: x.permute(ints(perm)),
    }


def selections() -> Table:
    """Operations that pick elements."""
    import torch

    def slice_by_index(
        x: Tensor,
        begin: Tensor,
        end: Tensor,
        stride: Tensor | None = None,
        begin_mask: Tensor | None = None,
        end_mask: Tensor | None = None,
        squeeze_mask: Tensor | None = None,
    ) -> Tensor:
        def flags(mask: Tensor | None) -> list[bool]:
            return [False] * x.dim() if mask is None else mask.tolist()

        steps = [1] * x.dim() if stride is None else ints(stride)
        if min(steps) < 1:
            raise UnsupportedOpError(f"stride {steps} is not covered, only positive ones are")
        index = [
            first if one else slice(None if from_start else first, None if to_end else last, step)
            for first, last, step, from_start, to_end, one in zip(
                ints(begin), ints(end), steps, flags(begin_mask), flags(end_mask), flags(squeeze_mask), strict=True
            )
        ]
        return x[tuple(index)]

    def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
        return x[
            tuple(
                slice(first, None if count == -1 else first + count)
                for first, count in zip(ints(begin), ints(size), strict=True)
            )
        ]

    def gather(
        x: Tensor,
        indices: Tensor,
        axis: Tensor | int = 0,
        batch_dims: Tensor | int = 0,
        validate_indices: Tensor | bool = False,
    ) -> Tensor:
        if int(batch_dims):
            raise UnsupportedOpError(f"batch_dims {int(batch_dims)} is not covered, only 0 is")
        along = int(axis) % x.dim()
        taken = x.index_select(along, indices.flatten().int())  # refuses what is out of bounds
        return taken.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :])

    def gather_along_axis(
        x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool = False
    ) -> Tensor:
        return x.take_along_dim(indices.long(), int(axis))

    def topk(
        x: Tensor,
        k: Tensor | int = 1,
        axis: Tensor | int = -1,
        ascending: Tensor | bool = False,
        sort: Tensor | bool = True,
        return_indices: Tensor | bool = True,
        output_indices_dtype: str = "int32",
    ) -> tuple[Tensor, ...]:
        if output_indices_dtype != "int32":
            raise UnsupportedOpError(f"output_indices_dtype '{output_indices_dtype}' is not covered, only int32 is")
        values, indices = x.topk(int(k), int(axis), largest=not ascending, sorted=True)
        return (values, indices.int()) if return_indices else (values,)

    def cumsum(
        x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False
    ) -> Tensor:
        if exclusive or reverse:
            raise UnsupportedOpError("exclusive or reverse sums are not covered")
        return x.cumsum(int(axis), dtype=x.dtype)

    def classify(probabilities: Tensor, classes: Sequence[str | int]) -> tuple[str | int, dict[str | int, float]]:
        scores = probabilities.flatten().tolist()
        if len(scores) != len(classes):
            raise ValueError(f"{len(scores)} probabilities for {len(classes)} classes")
        return classes[int(probabilities.argmax())], dict(zip(classes, scores, strict=True))

    def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
        below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])  # how far below the diagonal
        kept = ((below <= int(lower)) | (int(lower) < 0)) & ((-below <= int(upper)) | (int(upper) < 0))
        return torch.where(kept, x, 0.0)

    def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
        return padded(x, [-amount for amount in (*ints(crop_height), *ints(crop_width))])

    return {
        "band_part": band_part,
        "classify": classify,
        "crop": crop,
        "cumsum": cumsum,
        "gather": gather,
        "gather_along_axis": gather_along_axis,
        "slice_by_index": slice_by_index,
        "slice_by_size": slice_by_size,
        "topk": topk,
        "select": lambda cond, a, b: torch.where(cond, a, b),
    }
