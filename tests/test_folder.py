"""An artefact folder is there whole or not at all, and nothing is overwritten unasked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from castling_deploy.errors import UsageError
from castling_deploy.folder import MANIFEST, artifact_folder, files_in, refuse_if_taken


def write(path: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with artifact_folder(path, overwrite=overwrite) as folder:
        (folder / MANIFEST).write_text(text)


def test_the_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    with artifact_folder(path, overwrite=False) as folder:
        (folder / MANIFEST).write_text("x")
        assert not path.exists()
    assert [str(name) for name in files_in(path)] == [MANIFEST]
    assert os.listdir(path.parent) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises((error, UsageError)), artifact_folder(tmp_path / "a", overwrite=False) as folder:
        (folder / "half").write_text("x")
        raise error("broken")
    assert os.listdir(tmp_path) == []


def test_an_artefact_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(UsageError, match="exists already") as caught:
        write(tmp_path / "a")
    assert "--overwrite" in (caught.value.hint or "")
    assert (tmp_path / "a" / MANIFEST).read_text() == "old"
    write(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / MANIFEST).read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_replacement_keeps_the_old_artefact(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="broken"), artifact_folder(tmp_path / "a", overwrite=True):
        raise ValueError("broken")
    assert (tmp_path / "a" / MANIFEST).read_text() == "old"


def test_what_is_no_artefact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").write_text("precious")
    for name in ("photos", "file"):
        with pytest.raises(UsageError, match="is no artefact folder"):
            refuse_if_taken(tmp_path / name, overwrite=True)


def test_an_output_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        write(tmp_path / "out" / "a")


def test_a_killed_run_leaves_no_folder_of_that_name_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from castling_deploy.folder import artifact_folder
        with artifact_folder(Path(sys.argv[1]), overwrite=False) as folder:
            (folder / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists() and len(os.listdir(tmp_path)) == 1
    write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
