"""A temporary folder that outlives nobody: the next one removes those whose process was killed before it could."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "castling-"
LOCK = ".castling-lock"  # locked while the owner lives: the kernel lets go of it with the process, however that ends


class Scratch:
    """`path` is an empty folder of this process, until `close`."""

    def __init__(self) -> None:
        remove_abandoned(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        unlocked = self.path / f"{LOCK}-new"
        self._lock = open(unlocked, "wb")  # noqa: SIM115  # closed in close
        if _locked(self._lock.fileno()):
            unlocked.rename(self.path / LOCK)  # so that it never stands there unlocked while the owner lives

    def close(self) -> None:
        """Remove it with all it holds."""
        self._folder.cleanup()
        self._lock.close()


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders of this user in `parent` whose process is gone; processes of other containers that
    share the folder hold their locks here too, where their numbers mean nothing."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # not ours to open, no scratch folder, or removed by somebody else just now
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if folder.lstat().st_uid == os.getuid() and _locked(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(descriptor: int) -> bool:
    """Lock an open file unless another process has; False where it has, and where there are no such locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
