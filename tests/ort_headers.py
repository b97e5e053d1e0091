"""ONNX Runtime's C++ headers, which no wheel holds: named in the environment, on this machine, or Debian's package."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from castling_deploy.cache import being_set_up, cache_folder
from castling_deploy.errors import SetupError
from castling_deploy.witnesses.debian import DebianPackages, unpack

HEADER = "onnxruntime_cxx_api.h"
SUITE = "trixie"  # Debian 13: the first with a libonnxruntime-dev. Headers alone, so its C++ library does not matter.
PACKAGE = "libonnxruntime-dev"
NAME = "test-ort-headers"
LEAST = 21  # ORT_API_VERSION: Debian 13 has 1.21.0. A later library serves earlier headers, not the other way round.
ON_THIS_MACHINE = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")


@cache
def headers() -> Path:
    """The folder of `onnxruntime_cxx_api.h`: $ONNXRUNTIME_INCLUDE, else this machine's, else fetched once (85 kB).

    Raises SetupError with the reason where there are none.
    """
    if named := os.environ.get("ONNXRUNTIME_INCLUDE"):
        if (version := api_version(Path(named))) < LEAST:
            raise SetupError(f"$ONNXRUNTIME_INCLUDE ('{named}') holds version 1.{version}, and 1.{LEAST} is needed")
        return Path(named)
    for folder in map(Path, ON_THIS_MACHINE):
        if api_version(folder) >= LEAST:
            return folder
    final = cache_folder(NAME)
    final.parent.mkdir(parents=True, exist_ok=True)
    with (final.parent / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of the same test run want them too
        if not final.exists():
            _fetch()
    return final / "onnxruntime"


def _fetch() -> None:
    with being_set_up(NAME) as folder, tempfile.TemporaryDirectory() as work:
        (apt := Path(work, "apt")).mkdir()
        (deb,) = DebianPackages(apt, suites=[SUITE]).fetch([PACKAGE], Path(work, "debs"), lambda share: None)
        unpack(deb, Path(work, "files"))
        shutil.copytree(Path(work, "files", "usr", "include", "onnxruntime"), folder / "onnxruntime")
        if (version := api_version(folder / "onnxruntime")) < LEAST:
            raise SetupError(f"{deb.name} has version {version} of the headers", hint=f"at least {LEAST} is needed")


def api_version(folder: Path) -> int:
    """`ORT_API_VERSION` of the headers there, the minor number of their release; 0 where there are none."""
    if not (folder / HEADER).is_file():
        return 0
    text = (folder / "onnxruntime_c_api.h").read_text()
    (version,) = re.findall(r"^#define ORT_API_VERSION (\d+)", text, re.MULTILINE)
    return int(version)
