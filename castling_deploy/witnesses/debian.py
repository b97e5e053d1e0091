"""Debian packages, fetched and unpacked into a folder: nothing is installed, and no privileges are needed.

apt checks the signatures and hashes. It keeps its lists and its state in a folder of ours, takes the mirror from the
machine's own sources and the proxies from its configuration, and leaves the machine's own state alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from castling_deploy.errors import SetupError

SUITES = ("bookworm", "bookworm-backports")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = ("apt-get", "dpkg", "dpkg-deb")
POLL_S = 0.1

CONFIGURATION = """\
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Architectures {{ "{host}"; "{guest}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Cache "{home}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::sourcelist "{home}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{home}/state";
Dir::State::status "{home}/status";
"""


class DebianPackages:
    """Packages of Debian 12 and its backports for this machine and for `guest`, by way of the empty folder `home`.

    `suites`: those of another release. Raises SetupError where the machine has no apt, does not know Debian's keys, or
    names no mirror that can be reached.
    """

    def __init__(self, home: Path, guest: str | None = None, suites: Sequence[str] = SUITES) -> None:
        absent = [tool for tool in TOOLS if shutil.which(tool) is None]
        if absent:
            raise SetupError(
                f"Debian packages are needed, and this system lacks {', '.join(absent)}",
                hint="set it up on Debian or Ubuntu, or in a container of debian:12",
            )
        if not KEYRING.is_file():
            raise SetupError(
                f"the keys of Debian's packages are not here ({KEYRING})",
                hint="sudo apt-get install debian-archive-keyring",
            )
        self.host = _output("dpkg", "--print-architecture").strip()
        self._home, self._configuration, self._suites = home, home / "apt.conf", suites
        for folder in ("cache/archives/partial", "state/lists/partial"):
            (home / folder).mkdir(parents=True)
        (home / "status").touch()
        self._configuration.write_text(CONFIGURATION.format(host=self.host, guest=guest or self.host, home=home))
        self._mirror = mirror()
        (home / "sources.list").write_text(
            "".join(f"deb [signed-by={KEYRING}] {self._mirror} {suite} main\n" for suite in suites)
        )
        self._apt("update")

    def fetch(self, packages: Sequence[str], into: Path, advance: Callable[[float], None]) -> list[Path]:
        """The .deb files of `packages` (name, name:architecture or name/suite). Raises SetupError."""
        into.mkdir()
        listed = self._apt("download", "--print-uris", *packages)
        total = sum(int(size) for size in re.findall(r"^'\S+' \S+ (\d+) ", listed, re.MULTILINE))
        self._apt(
            "download",
            *packages,
            cwd=into,
            polled=lambda: advance(min(sum(_size(file) for file in into.iterdir()) / max(total, 1), 1.0)),
        )
        return sorted(into.glob("*.deb"))

    def _apt(
        self, verb: str, *arguments: str, cwd: Path | None = None, polled: Callable[[], None] = lambda: None
    ) -> str:
        command = ["apt-get", "-q", "-c", str(self._configuration), verb, *arguments]
        out, err = self._home / "apt.out", self._home / "apt.err"
        with (
            out.open("w") as said,
            err.open("a") as complained,
            subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=complained) as process,
        ):
            try:
                while process.poll() is None:
                    polled()
                    time.sleep(POLL_S)
            finally:
                process.kill()
        if process.returncode:
            words = "\n".join(err.read_text(errors="replace").splitlines()[-8:])
            raise SetupError(
                f"apt-get {verb} failed with {self._mirror} ({self._suites[0]})",
                hint=f"see that this machine reaches it, or set apt's proxy; apt's last words:\n{words}",
            )
        return out.read_text(errors="replace")


def mirror() -> str:
    """The mirror of Debian in the machine's own sources. Raises SetupError where there is none."""
    listed = _output("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    own = [uri for uri in listed.split() if uri.rstrip("/").endswith("/debian")]
    if not own:
        raise SetupError(
            "this machine's sources of packages name no mirror of Debian",
            hint="add one to /etc/apt/sources.list.d, or set it up in a container of debian:12",
        )
    return own[0]


def unpack(deb: Path, into: Path) -> None:
    """All files of a package. Raises SetupError."""
    _output("dpkg-deb", "--extract", str(deb), str(into))


def unpack_one(deb: Path, member: str, into: Path) -> None:
    """One file of a package, as the file `into`. Raises SetupError when the package does not hold it."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for entry in archive:
                    if entry.name == member and (file := archive.extractfile(entry)) is not None:
                        with into.open("wb") as out:
                            shutil.copyfileobj(file, out)
                        into.chmod(0o755)
                        return
        finally:
            process.kill()
    raise SetupError(f"{deb.name} holds no {member}", hint="report it: Debian's package has changed")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # apt renames what it has fetched
        return 0


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise SetupError(f"{command[0]} failed: {done.stderr.strip()[-500:]}", hint="look at this machine's apt")
    return done.stdout
