"""`--no-skips` lets nothing be left out for want of a tool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = {
    "mark": "@pytest.mark.skipif(True, reason={reason!r})\ndef test_it(): pass",
    "call": "def test_it(): pytest.skip({reason!r})",
    "fixture": "@pytest.fixture\ndef tool(): pytest.skip({reason!r})\ndef test_it(tool): pass",
    "module": "pytest.importorskip('no_such_module', reason={reason!r})\ndef test_it(): pass",
    "none": "def test_it(): pass",
    "expected failure": "@pytest.mark.xfail(reason={reason!r})\ndef test_it(): assert False",
}
RUN = [sys.executable, "-m", "pytest", "-q", "-p", "no_skips", "-p", "xdist.plugin", "-p", "no:cacheprovider"]
TOOL, MACHINE = "npm is not installed", "for machines without a GPU"


def code(folder: Path, how: str, reason: str, *options: str) -> int:
    """pytest's exit code for one test that is skipped in such a way."""
    file = folder / "test_one.py"
    file.write_text("import pytest\n" + SKIPS[how].format(reason=reason) + "\n\n\ndef test_other(): pass\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([*RUN, *options, file], cwd=folder, env=environment, capture_output=True).returncode


@pytest.mark.parametrize("how", ["mark", "call", "fixture", "module"])
def test_a_test_without_its_tool_fails_whatever_skips_it(how: str, tmp_path: Path) -> None:
    assert code(tmp_path, how, TOOL, "--no-skips") in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)


def test_in_a_worker_too(tmp_path: Path) -> None:
    assert code(tmp_path, "call", TOOL, "--no-skips", "-n", "1") == pytest.ExitCode.TESTS_FAILED


def test_nothing_else_changes(tmp_path: Path) -> None:
    assert code(tmp_path, "call", TOOL) == 0
    assert code(tmp_path, "call", MACHINE, "--no-skips") == 0
    assert code(tmp_path, "none", TOOL, "--no-skips") == 0
    assert code(tmp_path, "expected failure", TOOL, "--no-skips") == 0
