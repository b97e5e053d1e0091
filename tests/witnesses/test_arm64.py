"""Arm's kernels without an Arm machine. The set-up is a real one: into the default cache, if it is not there yet."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from exported import CLASSIFIER
from exported import exported as shared_export

from castling_deploy.artifact import read_folder
from castling_deploy.cache import being_set_up, cache_folder
from castling_deploy.errors import ExportError, SetupError, TargetUnavailableError
from castling_deploy.execution import inputs_for, run_artifact
from castling_deploy.parity import TOLERANCES, OutputParity, Reference, Verdict
from castling_deploy.probes import Probes
from castling_deploy.runner import Runner, SetUp, runners_of
from castling_deploy.target import WitnessKind, target_named
from castling_deploy.task import Outputs, task_named
from castling_deploy.verification import compared, opened
from castling_deploy.witnesses import arm64_build, arm64_sysroot

TARGETS = ("onnx", "executorch")
SET_UP = "from castling_deploy.witnesses.arm64_build import set_up; set_up(lambda share: None)"
pytestmark = [
    pytest.mark.skipif(arm64_sysroot.unsuited() is not None, reason="needs Linux on x86-64"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get, which fetches Debian's packages, is not here"),
]
Exported = Callable[[str, str], Path]


def arm64(target: str) -> Runner:
    return runners_of(target_named(target))["arm64"]


@pytest.fixture(scope="module", autouse=True)
def emulation() -> None:
    """About 180 MB to fetch, half a minute, once per machine."""
    arm64_build.set_up(lambda share: None)


@pytest.fixture(scope="module")
def exported() -> Exported:
    """The folder of the bundled digits network, by target and precision."""

    def export(target: str, precision: str) -> Path:
        pytest.importorskip("executorch" if target == "executorch" else "onnxruntime")
        return shared_export(CLASSIFIER, target, precision).path

    return export


def inputs_of(path: Path) -> np.ndarray:
    folder = read_folder(path)
    images = np.load(path / "golden" / "images.npy")
    return inputs_for(folder.artifact.inputs[0], Probes.of(images, folder.preprocessing))


def on_arm(path: Path, inputs: np.ndarray) -> Outputs:
    folder = read_folder(path)
    return arm64(folder.target).run(path, folder.artifact, inputs, lambda share: None)


def here(path: Path, inputs: np.ndarray) -> Outputs:
    folder = read_folder(path)
    with opened(target_named(folder.target), path) as session:
        return run_artifact(session, folder.artifact, inputs)


def against_golden(path: Path, outputs: Outputs) -> OutputParity:
    folder = read_folder(path)
    golden = {name: np.load(path / "golden" / f"{name}.npy") for name in folder.noise}
    references = {
        name: Reference(values, real=len(values), noise=folder.noise[name]) for name, values in golden.items()
    }
    tolerance = TOLERANCES[folder.precision]
    (parity,) = compared(task_named(folder.task), outputs, references, tolerance, folder.preprocessing.size)
    return parity


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_arm_kernels_compute_what_the_reference_says(exported: Exported, target: str, precision: str) -> None:
    path = exported(target, precision)
    parity = against_golden(path, on_arm(path, inputs_of(path)))
    assert parity.verdict is Verdict.PASS
    assert parity.top1_agreement == 1.0


def test_float16_is_added_up_in_float16_there(exported: Exported) -> None:
    """On x86, ONNX Runtime multiplies and adds in float32, which hides most of the error that a phone shows."""
    path = exported("onnx", "fp16")
    inputs = inputs_of(path)
    arm, x86 = against_golden(path, on_arm(path, inputs)).rel, against_golden(path, here(path, inputs)).rel
    assert arm is not None and x86 is not None
    assert arm > 3 * x86  # 2.2e-3 and 3.4e-4 with ONNX Runtime 1.32.0


def test_progress_reaches_one_and_no_process_is_left(exported: Exported) -> None:
    path, shares = exported("onnx", "fp32"), list[float]()
    folder = read_folder(path)
    arm64("onnx").run(path, folder.artifact, inputs_of(path)[:3], shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert [child for child in psutil.Process().children(recursive=True) if "qemu" in child.name()] == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_an_error_with_the_runtimes_words(exported: Exported, target: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(exported(target, "fp32"), path)
    folder = read_folder(path)
    (file,) = folder.artifact.files
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match=r"aarch64 .* ended with exit code") as caught:
        on_arm(path, inputs_of(path))
    assert caught.value.hint is not None and "last words" in caught.value.hint


@pytest.mark.parametrize("target", TARGETS)
def test_an_input_of_another_shape_is_an_error(exported: Exported, target: str) -> None:
    path = exported(target, "fp32")
    with pytest.raises(ExportError, match="ended with exit code"):
        on_arm(path, np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize("target", TARGETS)
def test_it_says_what_it_emulates(target: str) -> None:
    runner = arm64(target)
    assert runner.missing() is None and isinstance(runner, SetUp)
    witness = runner.witness()
    assert witness.kind is WitnessKind.EMULATED
    assert "aarch64 (qemu " in witness.name and witness.name.endswith(", cortex-a76)")


@pytest.mark.parametrize("target", TARGETS)
def test_a_set_up_for_other_versions_is_not_used(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    path = exported(target, "fp32")
    inputs, stamp = inputs_of(path), cache_folder("arm64") / "stamp.json"
    monkeypatch.setenv("CASTLING_CACHE", str(tmp_path))
    runner: Runner = arm64(target)
    lacking = runner.missing()
    assert lacking is not None and lacking.fix == "castling setup arm64"
    (tmp_path / "arm64").mkdir()
    package = "onnxruntime" if target == "onnx" else "executorch"
    old = stamp.read_text().replace(arm64_sysroot.installed(package) or "?", "1.0.0")
    (tmp_path / "arm64" / "stamp.json").write_text(old)
    lacking = runner.missing()
    assert lacking is not None and "1.0.0" in lacking.reason
    with pytest.raises(TargetUnavailableError, match=r"1\.0\.0"):
        on_arm(path, inputs)


def test_what_is_set_up_is_not_set_up_again() -> None:
    before, shares = cache_folder("arm64").stat().st_ino, list[float]()
    arm64("onnx").set_up(shares.append)  # type: ignore[attr-defined]
    assert cache_folder("arm64").stat().st_ino == before and shares == [1.0]


def started(cache: Path) -> subprocess.Popen[bytes]:
    """A set-up into an empty cache that has begun to fetch."""
    process = subprocess.Popen(
        [sys.executable, "-c", SET_UP],
        env={**os.environ, "CASTLING_CACHE": str(cache)},
        # tests that run in a shell's background are born with SIGINT ignored, and so would be this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(cache.glob(".arm64.partial-*/build/apt/apt.conf")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_an_interrupted_set_up_leaves_nothing(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send_signal(signal.SIGINT)  # which `castling` makes of SIGTERM too
    assert process.wait(60) != 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_set_up_leaves_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = started(tmp_path)
    process.kill()
    process.wait()
    monkeypatch.setenv("CASTLING_CACHE", str(tmp_path))
    assert not cache_folder("arm64").exists()
    with pytest.raises(RuntimeError), being_set_up("arm64"):
        assert len(list(tmp_path.iterdir())) == 1
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PATH", "/nonexistent", "lacks apt-get"),
        ("http_proxy", "http://127.0.0.1:9", "apt-get .* failed"),
        ("CASTLING_CACHE", "/proc/castling", "cannot write"),
    ],
)
def test_a_machine_that_cannot_is_told_why(
    variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASTLING_CACHE", str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(SetupError, match=message) as caught:
        arm64_build.set_up(lambda share: None)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTLING_CACHE", str(tmp_path))
    monkeypatch.setattr(arm64_build, "NEEDED_BYTES", shutil.disk_usage(tmp_path).total + 1)
    with pytest.raises(SetupError, match="MB free"):
        arm64_build.set_up(lambda share: None)
    assert list(tmp_path.iterdir()) == []


def test_the_emulated_program_ends_when_its_caller_is_killed(exported: Exported) -> None:
    path = exported("onnx", "fp32")
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from castling_deploy.witnesses import arm64_sysroot\n"
        "from castling_deploy.witnesses.guest import guest\n"
        "from castling_deploy.witnesses.ort_arm64 import SCRIPT, OrtArm64\n"
        "here = arm64_sysroot.require('onnxruntime')\n"
        "with guest(here.python(SCRIPT, sys.argv[1]), OrtArm64().witness()) as session:\n"
        "    print(session._process.pid, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path / "model.onnx")], stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        program = psutil.Process(int(caller.stdout.readline()))
        assert "qemu" in program.name()
        caller.kill()
    program.wait(20)
