"""Memory: given back to the system once it is free, and a plain error where there is too little of it."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress

from castling_deploy.errors import TargetUnavailableError


def give_back() -> None:
    """What was freed goes back to the system. glibc keeps it for this process otherwise, and an export runs in another:
    1.5 GB behind the reference of Castling-DeiT-B. Elsewhere (macOS, musl) nothing is done."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def lacking(error: Exception) -> TargetUnavailableError | None:
    """The error to be told where `error` says that memory is lacking: Python's, numpy's, or torch's, which is a
    RuntimeError like any other and known by its words alone. None where it is something else."""
    said = str(error)
    if not isinstance(error, MemoryError) and not re.search(r"can't allocate memory|out of memory", said):
        return None
    asked = re.search(r"allocate (\d+) bytes", said)
    size = f" for {int(asked[1]) / 2**30:.1f} GiB more" if asked else ""
    return TargetUnavailableError(
        f"this machine has no memory{size}", hint="close what else takes memory, or use a smaller --imgsz or --jobs 1"
    )
