"""What runs Arm programs on this machine: an emulator, a small Debian for arm64, and the runtimes' own arm64 builds.

It stands in the cache, where `arm64_build.py` put it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from castling_deploy.cache import cache_folder
from castling_deploy.errors import TargetUnavailableError
from castling_deploy.target import Missing, Witness, WitnessKind

NAME = "arm64"
CPU = "cortex-a76"  # 2018's big phone core: has FP16 arithmetic and dot products, no SVE
PYTHON = "3.11"  # Debian 12's
# A DeiT-T at 224 px takes 5 s an image in float32, and 23 s in float16, which the emulator computes in software.
IMAGES = 8
SETUP = "castling setup arm64"
RUNNER_SOURCE = Path(__file__).with_name("executorch_runner.cpp")


@dataclass(frozen=True)
class Stamp:
    """What a set-up was built from. `executorch` and `runner` (of its source) are None when it was not installed."""

    qemu: str
    numpy: str
    onnxruntime: str
    executorch: str | None
    runner: str | None


@dataclass(frozen=True)
class Sysroot:
    """A complete set-up in `folder`."""

    folder: Path
    stamp: Stamp

    @property
    def emulator(self) -> str:
        """The emulator with its version and the CPU it plays."""
        return f"qemu {self.stamp.qemu}, {CPU}"

    def python(self, script: Path, *arguments: str) -> list[str]:
        """The command that runs `script` on the arm64 Python; the first argument is where its packages are."""
        return [*emulated(self.folder), *python(self.folder), str(script), str(self.folder / "packages"), *arguments]

    def executorch(self, *arguments: str) -> list[str]:
        """The command that runs ExecuTorch's runner."""
        return [*emulated(self.folder), str(self.folder / "executorch" / "runner"), *arguments]


def sysroot() -> Sysroot | None:
    """The set-up in the cache, of whatever versions; None when there is none."""
    folder = cache_folder(NAME)
    try:
        return Sysroot(folder, Stamp(**json.loads((folder / "stamp.json").read_text())))
    except (OSError, ValueError, TypeError):
        return None


def unsuited() -> Missing | None:
    """Why nothing can be emulated on this machine."""
    if sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64"):
        return None
    return Missing("Arm programs are emulated on Linux on x86-64 only", "run it on such a machine")


def missing(package: str) -> Missing | None:
    """What keeps the arm64 build of `package` (onnxruntime, executorch) from running here."""
    if (lacking := unsuited()) is not None:
        return lacking
    wanted = installed(package)
    if wanted is None:
        extra = "castling-deploy" if package == "onnxruntime" else f"'castling-deploy[{package}]'"
        return Missing(f"{package} is not installed", f"pip install {extra}")
    here = sysroot()
    if here is None:
        return Missing("there is no arm64 emulation in the cache", SETUP)
    found = getattr(here.stamp, package)
    if found != wanted:
        return Missing(f"the arm64 emulation was set up for {package} {found}, and {wanted} is installed", SETUP)
    if package == "executorch" and here.stamp.runner != fingerprint(RUNNER_SOURCE):
        return Missing("the arm64 emulation was set up by another version of castling-deploy", SETUP)
    return None


def witness(title: str, package: str) -> Witness:
    """Who runs the arm64 build of `package`, called `title`, on this machine."""
    here = sysroot()
    build, emulator = (getattr(here.stamp, package), here.emulator) if here else (installed(package), CPU)
    return Witness(f"{title} {build} aarch64 ({emulator})", WitnessKind.EMULATED)


def require(package: str) -> Sysroot:
    """The set-up, in the installed version of `package`. Raises TargetUnavailableError."""
    lacking, here = missing(package), sysroot()
    if lacking is not None or here is None:
        reason, fix = (lacking.reason, lacking.fix) if lacking else ("the arm64 emulation is gone", SETUP)
        raise TargetUnavailableError(reason, hint=fix)
    return here


def emulated(folder: Path) -> list[str]:
    """What stands before an arm64 program's path in a command."""
    return [str(folder / "qemu-aarch64"), "-cpu", CPU, "-L", str(folder / "sysroot")]


def python(folder: Path) -> list[str]:
    """The arm64 Python, which sees no package and no setting of this machine's."""
    return [str(folder / "sysroot" / "usr" / "bin" / f"python{PYTHON}"), "-I", "-S"]


def installed(package: str) -> str | None:
    """The version of `package` on this machine."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fingerprint(source: Path) -> str:
    """Tells one version of a source file from another."""
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]
