"""Palettised weights: a look-up table of 2**bits numbers, and which of them each weight is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from castling_deploy.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BITS = (4, 6, 8)  # of an index; the formats have 1 and 2 too, with which no bundled network keeps its score
ROUNDS = 100


def require_bits(bits: int | None) -> None:
    """Raises UsageError for an index that no table has; None asks for no tables."""
    if bits not in (None, *BITS):
        raise UsageError(f"no look-up table by {bits} bits", hint=f"use one of: {', '.join(map(str, BITS))}")


def palettised(weight: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """The index of every weight, in its place, and the table, from the least number to the largest.

    k-means in one dimension (Lloyd), from even steps between the least weight and the largest: the same table every
    time. It is float16, so that what is verified is what is stored.
    """
    import numpy as np

    values = np.sort(weight, axis=None).astype(np.float64)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    table = np.linspace(values[0], values[-1], 2**bits)
    for _ in range(ROUNDS):
        cuts = np.concatenate([[0], np.searchsorted(values, middles(table)), [len(values)]])
        counts = np.diff(cuts)
        means = np.where(counts > 0, np.diff(totals[cuts]) / np.maximum(counts, 1), table)
        if np.array_equal(means, table):
            break
        table = means
    stored = table.astype(np.float16)
    indices = np.searchsorted(middles(stored.astype(np.float64)), weight)
    return indices.astype(np.uint8), stored


def packed(indices: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Indices or levels of so many bits one after another in bytes, the lowest bit first, as all formats have them."""
    import numpy as np

    each = np.unpackbits(indices.astype(np.uint8).reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(each, bitorder="little")


def unpacked(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` of what is `packed` so."""
    import numpy as np

    each = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]


def middles(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Between two neighbours in the table."""
    return (table[1:] + table[:-1]) / 2
