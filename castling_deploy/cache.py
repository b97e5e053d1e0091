"""Where `castling setup` puts what pip cannot install: one folder per runner, in the user's cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from castling_deploy.folder import remove_stale


def cache_folder(name: str) -> Path:
    """The folder of `name`, which exists only once its set-up is complete.

    `$CASTLING_CACHE`, else `$XDG_CACHE_HOME/castling-deploy`, else `~/.cache/castling-deploy`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CASTLING_CACHE") or Path(home) / "castling-deploy") / name


@contextmanager
def being_set_up(name: str) -> Iterator[Path]:
    """An empty folder beside the cache's, which takes its place when the block ends well, and vanishes otherwise.

    A process killed in the middle leaves at most a hidden folder, which the next set-up of the same name removes.
    """
    final = cache_folder(name)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(final)
    partial = final.parent / f".{name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process number
    try:
        partial.mkdir()
        yield partial
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
