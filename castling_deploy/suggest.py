"""The nearest right name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FEW = 16  # names that one line can hold


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """One sentence for an error's hint: the closest known name if there is one, and all of them, or the nearest few."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    suggestion = f"did you mean '{close[0]}'? " if close else ""
    if len(known) <= FEW:
        return f"{suggestion}known: {', '.join(known)}"
    others = close[1:] or known[:5]
    return f"{suggestion}{len(known)} names are known, among them {', '.join(others)}; castling models lists them"
