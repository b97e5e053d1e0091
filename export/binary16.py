"""float16, IEEE 754 binary16: what it holds, and what it turns into something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LARGEST, SMALLEST_NORMAL, UNIT_ROUNDOFF = 65504.0, 2.0**-14, 2.0**-11
# A float16 sum of equal terms stops growing here: the next term is less than half a unit in the last place.
LONGEST_SUM = 2**11


def fits(constant: npt.NDArray[np.float32]) -> bool:
    """Whether float16 holds a constant to its precision, 2^-11 relative, taken over the whole tensor.

    The largest entry has to be a normal float16, neither infinite nor subnormal. Entries far below it may become
    subnormal, as long as the tensor as a whole loses no more than rounding.
    """
    import numpy as np

    peak = float(np.abs(constant).max(initial=0.0))
    if peak == 0.0:
        return True
    if not SMALLEST_NORMAL <= peak <= LARGEST:
        return False
    wide = constant.astype(np.float64)
    return float(np.linalg.norm(wide - constant.astype(np.float16))) <= UNIT_ROUNDOFF * float(np.linalg.norm(wide))
