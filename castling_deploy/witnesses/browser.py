"""A Chromium without a window: found, started on one page, and ended with all of its processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
VERSION_LIMIT_S = 30
FLAGS = (
    "--headless",
    "--no-sandbox",  # root has none, nor has a container without user namespaces; the page is ours alone
    "--disable-dev-shm-usage",  # a container's /dev/shm holds 64 MB
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def executable() -> str | None:
    """`$CHROME`, or the first browser on the path that runs headless; None when there is none."""
    asked = os.environ.get("CHROME")
    names = [asked] if asked else NAMES
    return next(filter(None, map(shutil.which, names)), None)


def version() -> str:
    """Its name with the version, as it says itself: "Chromium 156.0.8078.79"."""
    browser = executable()
    if browser is None:
        return "no browser"
    try:
        said = subprocess.run([browser, "--version"], capture_output=True, text=True, timeout=VERSION_LIMIT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    found = re.search(r"[A-Z][\w ]*? [\d.]+", said)
    return found[0] if found else Path(browser).name


@dataclass(frozen=True)
class Browser:
    """A running browser; `log` is what it writes to stderr."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    @property
    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


@contextmanager
def showing(address: str) -> Iterator[Browser]:
    """The browser with `address` open, in a profile of its own; at the end of the block it is killed, and forgotten."""
    command = executable()
    assert command is not None
    # It may still write as it dies.
    with tempfile.TemporaryDirectory(prefix="castling-browser-", ignore_cleanup_errors=True) as profile:
        log = Path(profile, "log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [command, *FLAGS, f"--user-data-dir={profile}/profile", address],
                env={**os.environ, "TMPDIR": "/tmp"},  # of its sockets, whose paths may have 108 bytes
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # a process group, to be ended as one
            )
        try:
            yield Browser(process, log)
        finally:
            if os.name == "posix":
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
