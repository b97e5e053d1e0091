"""ONNX Runtime Web: the wasm build that web pages load, in a real browser without a window, on an ONNX artefact."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy import cache
from castling_deploy.errors import SetupError
from castling_deploy.export.to_onnx import FILE
from castling_deploy.target import Artifact, Missing, Witness, WitnessKind
from castling_deploy.witnesses import browser

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# SHA-512 of the package's archive, as npm's lock files write it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
MODULE, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"  # 14 MB of the package's 145
FETCH_LIMIT_S = 600


class OrtWeb:
    """One thread, the wasm provider; the GPU of a browser is another matter, and the one of this machine's is none."""

    name = "web"
    about = "ONNX Runtime for web pages, in a headless browser"
    targets: tuple[str, ...] = ("onnx",)
    images: int | None = 32

    def missing(self) -> Missing | None:
        if browser.executable() is None:
            return Missing(
                f"no browser is installed (none of {', '.join(browser.NAMES)})",
                "sudo apt-get install chromium, or set CHROME to the path of a Chrome",
            )
        if not all((_folder() / name).is_file() for name in (MODULE, WASM)):
            return Missing(f"{PACKAGE} {VERSION} is not set up", f"castling setup {self.name}")
        return None

    def witness(self) -> Witness:
        return Witness(f"{PACKAGE} {VERSION} (wasm, in {browser.version()})", WitnessKind.RUNTIME)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact
        from castling_deploy.witnesses.web_session import web_session

        files = {
            "ort.mjs": _folder() / MODULE,
            "ort.wasm": _folder() / WASM,
            "model.onnx": folder / FILE,
        }
        with web_session(files, self.witness()) as session:
            return run_artifact(session, artifact, inputs, advance)

    def set_up(self, advance: Advance) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise SetupError(
                f"npm, which fetches {PACKAGE}, is not installed",
                hint=f"sudo apt-get install npm, then castling setup {self.name}",
            )
        with cache.being_set_up(self.name) as folder:
            advance(0.0)
            archive = _fetched(npm, folder / "package")
            advance(0.8)
            _unpack(archive, folder / VERSION)
            shutil.rmtree(folder / "package")
            advance(1.0)


def _folder() -> Path:
    return cache.cache_folder(OrtWeb.name) / VERSION


def _fetched(npm: str, folder: Path) -> Path:
    """The package's archive, in `folder` with npm's own cache. Raises SetupError unless it is the one we know."""
    folder.mkdir()
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder), "--cache", str(folder / "npm")]
    hint = "npm has to reach its registry: npm ping tells whether it does"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"npm did not fetch {PACKAGE} within {FETCH_LIMIT_S} s", hint=hint) from error
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        words = " ".join(done.stderr.split())[-500:]
        raise SetupError(f"npm does not fetch {PACKAGE} {VERSION}: {words}", hint=hint)
    require_integrity(archives[0])
    return archives[0]


def require_integrity(archive: Path) -> None:
    """Raises SetupError unless `archive` is, byte for byte, the package that was tested."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise SetupError(
            f"the archive of {PACKAGE} {VERSION} is not the one that was tested: {found}",
            hint="the registry that npm is configured for serves another file: npm config get registry",
        )


def _unpack(archive: Path, folder: Path) -> None:
    """The two files that a page needs, into `folder`, which is made."""
    folder.mkdir()
    with tarfile.open(archive) as package:
        for name in (MODULE, WASM):
            member = package.extractfile(f"package/dist/{name}")
            assert member is not None
            with member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)
