"""Where the nodes of torch's graphs came from: kept, and no longer copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shared_provenance() -> Iterator[None]:
    """A block in which nodes that came from the same node share what is known of it.

    torch 2.13 notes for every node which node of the graph before it was, and which one that was before
    (`node.meta["from_node"]`), and every pass copies the whole descent deeply: 3.2 million copies, 2.3 of 17 s of CPU,
    where Castling-LeViT is lowered for ExecuTorch. A NodeSource does not change once it is made.
    """
    from torch.fx import traceback

    source: Any = getattr(traceback, "NodeSource", None)
    if source is None or hasattr(source, "__deepcopy__"):  # another torch, or a block around this one
        yield
        return
    source.__deepcopy__ = lambda self, memo: self
    try:
        yield
    finally:
        del source.__deepcopy__
