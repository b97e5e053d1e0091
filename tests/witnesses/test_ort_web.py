"""ONNX Runtime Web in a real browser, and the browser's end, whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from exported import CLASSIFIER, DETECTOR, damaged, exported, outputs_of, passed, verdicts, with_another_weight

from castling_deploy import cache
from castling_deploy.errors import ExportError, SetupError
from castling_deploy.parity import Verdict
from castling_deploy.target import WitnessKind
from castling_deploy.witnesses import browser
from castling_deploy.witnesses.ort_web import INTEGRITY, MODULE, VERSION, WASM, OrtWeb, require_integrity

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
needs_browser = pytest.mark.skipif(browser.executable() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which `castling setup web` has been, in the environment of this process and of its children."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASTLING_CACHE", str(folder))
        OrtWeb().set_up(lambda share: None)
        yield folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CASTLING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_npm
def test_setting_up_keeps_two_files(cached: Path) -> None:
    files = [path for path in cached.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {cached / "web" / VERSION}
    assert len(files) == 2 and sum(path.stat().st_size for path in files) < 20e6


@needs_npm
@needs_browser
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_agrees_on_a_classifier(precision: str, cached: Path) -> None:
    assert passed(verdicts(OrtWeb(), exported(CLASSIFIER, "onnx", precision)))


@needs_npm
@needs_browser
def test_it_agrees_on_a_detector_and_its_boxes(cached: Path) -> None:
    found = verdicts(OrtWeb(), exported(DETECTOR, "onnx", "fp32", nms=True))
    assert passed(found) and {"boxes", "scores", "labels"} <= found.keys()


@needs_npm
@needs_browser
def test_it_takes_any_batch_of_a_dynamic_one(cached: Path) -> None:
    assert passed(verdicts(OrtWeb(), exported(CLASSIFIER, "onnx", "fp32", dynamic=True)))


@needs_npm
@needs_browser
def test_a_single_weight_is_seen(cached: Path, tmp_path: Path) -> None:
    folder = with_another_weight(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "changed")
    assert verdicts(OrtWeb(), folder) == {"logits": Verdict.FAIL}


@needs_npm
@needs_browser
def test_what_the_page_throws_is_an_error_and_the_browser_ends(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damaged(exported(CLASSIFIER, "onnx", "fp32"), tmp_path / "damaged")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ExportError, match=r"the web page does not run the artefact: .*protobuf"):
        outputs_of(OrtWeb(), folder, 1)
    assert browsers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@needs_npm
def test_a_browser_that_ends_is_an_error(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROME", "false")
    with pytest.raises(ExportError, match="ended with exit code 1 before its page answered"):
        outputs_of(OrtWeb(), exported(CLASSIFIER, "onnx", "fp32"), 1)


@needs_npm
def test_only_the_browser_that_knows_the_token_is_served(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = tmp_path / "visitor"
    visitor.write_text(
        f"#!{sys.executable}\n"
        "import sys, urllib.error, urllib.parse, urllib.request\n"
        "page = sys.argv[-1]\n"
        "for address in (page, page + 'model.onnx', urllib.parse.urljoin(page, '/model.onnx'),\n"
        "                urllib.parse.urljoin(page, '/guess/model.onnx'), page + '../../etc/passwd'):\n"
        "    try:\n"
        "        print(urllib.request.urlopen(address).status)\n"
        "    except urllib.error.HTTPError as error:\n"
        "        print(error.code)\n"
    )
    visitor.chmod(0o755)
    monkeypatch.setenv("CHROME", str(visitor))
    with pytest.raises(ExportError, match="ended with exit code 0") as caught:
        outputs_of(OrtWeb(), exported(CLASSIFIER, "onnx", "fp32"), 1)
    assert (caught.value.hint or "").split()[-5:] == ["200", "200", "404", "404", "404"]


@needs_npm
@needs_browser
def test_a_page_that_does_not_answer_is_an_error(cached: Path, tmp_path: Path) -> None:
    done = answered_in_a_process(tmp_path, RUN.format(limit=0.001, ending=""))
    assert "ExportError: the browser did not answer within 0.001 s" in done.stderr
    assert browsers(tmp_path) == []


@needs_npm
@needs_browser
def test_the_browser_ends_when_its_runner_is_killed(cached: Path, tmp_path: Path) -> None:
    done = answered_in_a_process(tmp_path, RUN.format(limit=60, ending="os.kill(os.getpid(), signal.SIGKILL)"))
    assert done.stdout.split() == ["(1,", "10)"], done.stderr
    deadline = time.monotonic() + 30
    while browsers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browsers(tmp_path) == []


# One answer of the network in a page, then `ending`.
RUN = """
import os, signal, sys
from pathlib import Path
import numpy as np
from castling_deploy.witnesses.ort_web import OrtWeb
from castling_deploy.witnesses.web_session import web_session
files = dict(zip(("ort.mjs", "ort.wasm", "model.onnx"), map(Path, sys.argv[1:])))
with web_session(files, OrtWeb().witness(), limit_s={limit}) as session:
    print(session(dict(image=np.zeros((1, 3, 128, 128), np.float32)))["logits"].shape, flush=True)
    {ending}
"""


def answered_in_a_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`code` with the files of a page, in a process that has `folder` for temporary files."""
    runtime = cache.cache_folder("web") / VERSION
    files = [runtime / MODULE, runtime / WASM, exported(CLASSIFIER, "onnx", "fp32").path / "model.onnx"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, env=environment)


def browsers(folder: Path) -> list[str]:
    """Command lines of the living browsers whose profiles are in `folder`."""
    lines = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"{folder}/castling-browser-" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            lines.append(line)
    return lines


def test_what_is_missing_comes_with_the_line_that_mends_it(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROME", sys.executable)  # is found, and never run
    missing = OrtWeb().missing()
    assert missing is not None and missing.fix == "castling setup web"
    monkeypatch.setenv("CHROME", "no-such-browser")
    missing = OrtWeb().missing()
    assert missing is not None and "apt-get install chromium" in missing.fix


def test_without_npm_nothing_is_set_up(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="npm, which fetches onnxruntime-web, is not installed"):
        OrtWeb().set_up(lambda share: None)
    assert not elsewhere.exists()


@needs_npm
def test_a_registry_that_does_not_answer_leaves_nothing_behind(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")  # nobody listens there
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(SetupError, match=r"npm does not fetch onnxruntime-web 1\.30\.0"):
        OrtWeb().set_up(lambda share: None)
    assert list(elsewhere.iterdir()) == []


def test_another_archive_than_the_tested_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "package.tgz").write_bytes(b"another")
    with pytest.raises(SetupError, match="is not the one that was tested"):
        require_integrity(tmp_path / "package.tgz")
    assert INTEGRITY.startswith("sha512-")


@needs_npm
@needs_browser
def test_it_names_the_browser(cached: Path) -> None:
    witness = OrtWeb().witness()
    assert OrtWeb().missing() is None
    assert witness.kind is WitnessKind.RUNTIME and VERSION in witness.name and "Chrom" in witness.name
