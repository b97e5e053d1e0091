"""What XNNPACK's lowering looks for, and need not where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Parts of the names of operations that a graph has where a pattern occurs: all of one of these.
UPSAMPLING = (("upsample_bilinear2d",),)
# torch's own attention, whole or in parts: it multiplies q and k, each by the root of the scale. Nobody else does.
ATTENTION = (("attention",), ("softmax", "mul.Scalar"))


@contextmanager
def needed_patterns(program: torch.export.ExportedProgram) -> Iterator[None]:
    """A block that lowers `program` (ATen dialect): its search has the patterns that can occur in it.

    ExecuTorch 1.5.1 searches every delegate for bilinear upsampling and for attention, and exports six small networks
    to know how they look: 8 of the 31 s of CPU that lowering Castling-LeViT for 128 pixels takes. It has no option for
    that. The file is the same, byte by byte.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    searches: list[tuple[Any, str, tuple[tuple[str, ...], ...], Any]] = [
        (bilinear_2d, "get_graphs_dict", UPSAMPLING, dict),
        (sdpa, "get_graphs", ATTENTION, list),
    ]
    left_out = [
        (module, search, getattr(module, search), nothing)
        for module, search, signs, nothing in searches
        if hasattr(module, search) and not any(occurs(parts, names) for parts in signs)
    ]
    try:
        for module, search, _, nothing in left_out:
            setattr(module, search, nothing)
        yield
    finally:
        for module, search, before, _ in left_out:
            setattr(module, search, before)


def occurs(parts: Sequence[str], names: Sequence[str]) -> bool:
    """Whether each of `parts` is part of one of `names`."""
    return all(any(part in name for name in names) for part in parts)
