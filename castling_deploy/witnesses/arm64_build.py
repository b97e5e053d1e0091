"""`castling setup arm64`: the emulator, the sysroot and the arm64 runtimes, fetched and built into the cache.

Nothing is installed: Debian's packages and the wheels are unpacked, and the one program that no wheel holds,
ExecuTorch's runner, is compiled by a cross-compiler that is thrown away afterwards (GCC 12, like the sysroot: what a
newer one writes asks for a newer C library).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from castling_deploy.cache import being_set_up, cache_folder
from castling_deploy.errors import SetupError
from castling_deploy.witnesses.arm64_sysroot import (
    NAME,
    PYTHON,
    RUNNER_SOURCE,
    Stamp,
    emulated,
    fingerprint,
    installed,
    missing,
    python,
    unsuited,
)
from castling_deploy.witnesses.debian import DebianPackages, unpack, unpack_one

NEEDED_BYTES = 10**9  # at most, while it is built: 118 MB of packages, 57 MB of wheels, all of it unpacked
GLIBCS = range(17, 37)  # manylinux_2_17 to 2_36, Debian 12's C library

GUEST = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libstdc++6",
    "libgcc-s1",
    "zlib1g",
    "libexpat1",
    "libffi8",
)
COMPILER = (
    "g++-12-aarch64-linux-gnu",
    "gcc-12-aarch64-linux-gnu",
    "cpp-12-aarch64-linux-gnu",
    "binutils-aarch64-linux-gnu",
    "libbinutils",
    "libjansson4",
    "libgmp10",
    "libisl23",
    "libmpc3",
    "libmpfr6",
    "libzstd1",
    "zlib1g",
    "libc6-arm64-cross",
    "libc6-dev-arm64-cross",
    "linux-libc-dev-arm64-cross",
    "libgcc-s1-arm64-cross",
    "libgcc-12-dev-arm64-cross",
    "libstdc++6-arm64-cross",
    "libstdc++-12-dev-arm64-cross",
)
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# Newest first. From 8.2 on, qemu shows a guest the emulated CPU in /proc/cpuinfo; 7.2 shows it this machine's.
EMULATOR_PACKAGES = {
    "qemu-user/bookworm-backports": "./usr/bin/qemu-aarch64",
    "qemu-user-static": "./usr/bin/qemu-aarch64-static",
}
OWN_CPUINFO = (8, 2)
# ONNX Runtime reads the kind of CPU there, and crashes at import without it. As qemu 10.0.2 shows the CPU.
CPUINFO = """\
processor\t: 0
model name\t: ARMv8 Processor rev 1 (v8l)
BogoMIPS\t: 100.00
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""

# It compiles the modules too: 1 s from the second start on, not 10.
FIRST_IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); import onnxruntime"
LIBRARIES = ("executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool")
Advance = Callable[[float], None]


def set_up(advance: Advance) -> None:
    """Fetch and build everything, unless it is there in the installed versions. Raises SetupError."""
    if missing("onnxruntime") is None and (installed("executorch") is None or missing("executorch") is None):
        advance(1.0)
        return
    if (lacking := unsuited()) is not None:
        raise SetupError(lacking.reason, hint=lacking.fix)
    try:
        with being_set_up(NAME) as folder:
            _require_space(folder)
            _build(folder, advance)
    except OSError as error:
        raise SetupError(
            f"cannot write '{cache_folder(NAME).parent}': {error.strerror or error}",
            hint="set CASTLING_CACHE to a folder that can be written and has 1 GB of space",
        ) from error
    advance(1.0)


def _build(folder: Path, advance: Advance) -> None:
    """All of it in `folder`. What is only needed on the way stands in `folder/build`, and is removed."""
    executorch = installed("executorch")
    work = folder / "build"
    (work / "apt").mkdir(parents=True)
    debian = DebianPackages(work / "apt", NAME)
    advance(0.1)
    for deb in debian.fetch([f"{name}:{NAME}" for name in GUEST], work / "guest", _part(advance, 0.1, 0.2)):
        unpack(deb, folder / "sysroot")
    (folder / "sysroot" / "proc").mkdir()
    (folder / "sysroot" / "proc" / "cpuinfo").write_text(CPUINFO)
    qemu = _emulator(debian, folder, work, _part(advance, 0.2, 0.5))
    wheels = _wheels([f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")], work / "wheels")
    for wheel in wheels:
        _unzip(wheel, folder / "packages")
    advance(0.65)
    _try([*emulated(folder), *python(folder), "-c", FIRST_IMPORT, str(folder / "packages")])
    advance(0.7)
    if executorch is not None:
        (wheel,) = _wheels([f"executorch=={executorch}"], work / "executorch-wheel")
        _unzip(wheel, work / "sdk", ("executorch/include/", "executorch/lib/"))
        for deb in debian.fetch(
            [f"{name}:{debian.host}" if name in ("libzstd1", "zlib1g") else name for name in COMPILER],
            work / "compiler-packages",
            _part(advance, 0.75, 0.9),
        ):
            unpack(deb, work / "compiler")
        _compile(work / "compiler", work / "sdk" / "executorch", folder / "executorch")
        _try([*emulated(folder), str(folder / "executorch" / "runner"), "--check"])
    shutil.rmtree(work)
    stamp = Stamp(
        qemu,
        version("numpy"),
        version("onnxruntime"),
        executorch,
        None if executorch is None else fingerprint(RUNNER_SOURCE),
    )
    (folder / "stamp.json").write_text(json.dumps(asdict(stamp), indent=1) + "\n")


def _emulator(debian: DebianPackages, folder: Path, work: Path, advance: Advance) -> str:
    """`folder/qemu-aarch64`, copied from this machine or fetched; its version."""
    final = folder / "qemu-aarch64"
    for found in filter(None, map(shutil.which, EMULATORS)):
        if _numbers(_qemu_version(Path(found))) >= OWN_CPUINFO:
            shutil.copy(found, final)
            return _qemu_version(final)
    last = list(EMULATOR_PACKAGES)[-1]
    for package, member in EMULATOR_PACKAGES.items():
        try:
            (deb,) = debian.fetch([package], work / package.replace("/", "-"), advance)
        except SetupError:
            if package == last:
                raise
            continue  # backports are taken off the mirrors before the release is
        unpack_one(deb, member, final)
        break
    return _qemu_version(final)


def _qemu_version(qemu: Path) -> str:
    match = re.search(r"version (\d+(\.\d+)*)", _try([str(qemu), "--version"]))
    return match[1] if match else "0"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _wheels(requirements: Sequence[str], into: Path) -> list[Path]:
    """The aarch64 wheels of exactly these versions. Raises SetupError."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBCS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *platforms]
    command += ["--platform=manylinux2014_aarch64", f"--dest={into}", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = done.stderr.strip()[-800:]
        fix = "python -m ensurepip" if "No module named pip" in words else "see that pip reaches its index"
        raise SetupError(f"pip cannot fetch {' '.join(requirements)} for aarch64", hint=f"{fix}; it said:\n{words}")
    return sorted(into.glob("*.whl"))


def _unzip(wheel: Path, into: Path, only: tuple[str, ...] = ("",)) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into, [name for name in archive.namelist() if name.startswith(only)])


def _compile(prefix: Path, sdk: Path, into: Path) -> None:
    """The runner, with the libraries of ExecuTorch beside it."""
    into.mkdir()
    for name in LIBRARIES:
        shutil.copy(sdk / "lib" / f"lib{name}.so", into)
    include = sdk / "include"
    command = [str(prefix / "usr/bin/aarch64-linux-gnu-g++-12"), f"--sysroot={prefix}", "-std=c++17", "-O2", "-w"]
    # The wheel has no header that only a build of torch generates; this macro does without.
    command += ["-DC10_USING_CUSTOM_GENERATED_MACROS", f"-I{include}"]
    command += [f"-I{include / 'executorch/runtime/core/portable_type/c10'}", str(RUNNER_SOURCE)]
    # Kernels and backends register themselves: nothing refers to them, so the linker would drop them.
    command += [f"-L{into}", "-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES)]
    command += ["-Wl,-rpath,$ORIGIN", "-o", str(into / "runner")]
    libraries = prefix / "usr/lib/x86_64-linux-gnu"
    path = f"{prefix / 'usr/bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    _try(command, {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PATH": path})


def _try(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises SetupError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-1500:]
        raise SetupError(
            f"{Path(command[0]).name} ended with exit code {done.returncode}",
            hint=f"Debian 12 or Ubuntu 24.04 and later are needed; its last words:\n{words}",
        )
    return done.stdout


def _require_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise SetupError(
            f"{NEEDED_BYTES // 10**6} MB are needed while the arm64 emulation is built, and {folder.parent} has "
            f"{free // 10**6} MB free",
            hint="make room, or set CASTLING_CACHE to a folder on another disk",
        )


def _part(advance: Advance, start: float, end: float) -> Advance:
    return lambda share: advance(start + share * (end - start))
