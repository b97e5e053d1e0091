"""Temporary folders of killed processes go with the next run, and nobody else's do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from castling_deploy.isolation import IN_PROCESS, Worker
from castling_deploy.scratch import LOCK, PREFIX, Scratch, remove_abandoned

OWNER = (
    "import time; from castling_deploy.scratch import Scratch\n"
    "one = Scratch(); print(one.path, flush=True); time.sleep(600)"
)


def temporary_folder_of_a_job() -> str:
    import tempfile

    return tempfile.mkdtemp()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all processes of a test have their temporary folders."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_scratch_folder_goes_with_its_owner() -> None:
    scratch = Scratch()
    (scratch.path / "file").write_text("x")
    scratch.close()
    scratch.close()
    assert not scratch.path.exists()


def test_a_killed_owners_folder_is_removed_and_a_living_ones_is_not(temporary: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder, own = Path(owner.stdout.readline().strip()), Scratch()
    try:
        remove_abandoned(temporary)
        assert folder.is_dir() and own.path.is_dir()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert folder.is_dir(), "nobody has had the time to remove it"
        Scratch().close()
        assert not folder.exists() and own.path.is_dir()
    finally:
        owner.kill()
        owner.wait()
        own.close()


def test_folders_that_are_no_scratch_folders_stay(temporary: Path) -> None:
    mine, elsewhere = temporary / f"{PREFIX}mine", temporary / "elsewhere"
    mine.mkdir()
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("")
    (mine / LOCK).symlink_to(elsewhere / "lock")
    (temporary / f"{PREFIX}file").write_text("")
    remove_abandoned(temporary)
    assert sorted(os.listdir(temporary)) == [f"{PREFIX}file", f"{PREFIX}mine", "elsewhere"]


def test_what_a_worker_leaves_in_its_temporary_folder_goes_with_it(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(IN_PROCESS, raising=False)
    with Worker() as worker:
        left = Path(worker.call("leave a folder", temporary_folder_of_a_job))
        assert left.is_dir() and left.parent.parent == temporary
    assert os.listdir(temporary) == []
