"""Writing an artefact folder: all of it under its name, or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from castling_deploy.errors import UsageError

MANIFEST = "manifest.json"


def refuse_if_taken(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError where writing `path` would overwrite something unasked, or something that is no artefact."""
    try:
        if not path.exists() and not path.is_symlink():
            return
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}", hint="choose another --output") from None
    if not (path / MANIFEST).is_file():
        raise UsageError(f"'{path}' exists and is no artefact folder", hint="choose another --output")
    if not overwrite:
        raise UsageError(f"'{path}' exists already", hint="pass --overwrite to replace it, or choose another --output")


@contextmanager
def artifact_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path` when the block ends well and vanishes when it does not.

    A run killed in the middle leaves at most a hidden folder, which the next run of the same name removes. Raises
    UsageError where `path` is taken or cannot be written.
    """
    refuse_if_taken(path, overwrite=overwrite)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process number
        partial.mkdir()
        yield partial
        _replace(partial, path)
    except OSError as error:
        raise UsageError(
            f"cannot write '{path}': {error.strerror or error}",
            hint="choose an --output folder that can be written and has space",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, path: Path) -> None:
    """`partial` takes the name `path`; what was there before is gone only once the new folder is in place."""
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Folders of killed runs. One killed while it replaced an artefact left the old one aside: that gets its name
    back."""
    for folder in path.parent.glob(f".{path.name}.old-*"):
        if not path.exists():
            folder.rename(path)
    for folder in path.parent.glob(f".{path.name}.[po]*-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def files_in(folder: Path) -> list[Path]:
    """Every file below `folder`, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def size_bytes(folder: Path, entries: Sequence[str]) -> int:
    """The size of `entries` of `folder`, files or packages that are folders, in bytes."""
    paths = [path for entry in entries for path in ((folder / entry), *(folder / entry).rglob("*"))]
    return sum(path.stat().st_size for path in paths if path.is_file())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
