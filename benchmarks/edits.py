"""Artefact folders changed by a hand that also mends the hashes, so that nothing but the content can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from castling_deploy.artifact import sealed
from castling_deploy.folder import MANIFEST, files_in, sha256


def reseal(folder: Path, **changes: Any) -> None:
    """`changes` into the manifest of `folder`, in place, with the hashes of all files and its own as they are now."""
    manifest = {**json.loads((folder / MANIFEST).read_text()), **changes}
    manifest["files"] = {path.as_posix(): sha256(folder / path) for path in files_in(folder) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
