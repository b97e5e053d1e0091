"""The command: what people and machines read, exit codes, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deployments import ENVIRONMENT, ISOLATED, Run, castling, without_torch
from edits import manifest_of, reseal, with_golden
from networks import SMALL_DEIT, dense, small

from castling_deploy.models.attention import LinearAngularAttention
from castling_deploy.models.deit import CastlingDeiT

Files = Callable[[str], Path]


@pytest.fixture(scope="module")
def small_export(tmp_path_factory: pytest.TempPathFactory, checkpoint_file: Files) -> Path:
    """A small network for ONNX, exported once."""
    output = tmp_path_factory.mktemp("small")
    run = castling("export", checkpoint_file("deit"), "--target", "onnx", "--no-benchmark", "-o", output)
    assert run.code == 0, run.err
    (folder,) = output.iterdir()
    return folder


@pytest.fixture
def folder(small_export: Path, tmp_path: Path) -> Path:
    """A copy of it, under the same name."""
    return Path(shutil.copytree(small_export, tmp_path / small_export.name))


def is_two_lines(run: Run) -> bool:
    """The last two lines, after the stages."""
    *stages, error, hint = run.err.strip().splitlines()
    return error.startswith("error: ") and hint.startswith("  hint: ") and "Traceback" not in "".join(stages)


def test_help_names_every_command_and_exit_code() -> None:
    text = castling("--help").out
    for word in ("export", "inspect", "doctor", "verify", "bench", "diff", "Exit codes"):
        assert word in text


def test_castling_export_is_castling_export() -> None:
    code = "from castling_deploy.cli import export_main; export_main()"
    process = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert process.returncode == 0 and "--target" in process.stdout


def test_a_bad_checkpoint_overwrites_nothing(folder: Path, tmp_path: Path, checkpoint_file: Files) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bad = tmp_path / "deit.safetensors"
    bad.write_bytes(checkpoint_file("deit").read_bytes()[:-100])
    run = castling("export", bad, "--target", "onnx", "--overwrite", "-o", tmp_path)
    assert run.code == 2 and "damaged" in run.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_existing_artefact_is_not_overwritten_unasked(folder: Path, checkpoint_file: Files) -> None:
    arguments = ["export", checkpoint_file("deit"), "--target", "onnx", "--no-benchmark", "-o", folder.parent]
    again = castling(*arguments)
    assert again.code == 2 and "exists already" in again.err and "--overwrite" in again.err
    assert castling(*arguments, "--overwrite").code == 0


@pytest.mark.skipif(os.getuid() == 0 and not os.path.isdir("/proc"), reason="needs a folder that nobody can write")
def test_an_output_that_cannot_be_written_is_a_clear_error(checkpoint_file: Files) -> None:
    """/proc refuses every user, root too."""
    run = castling("export", checkpoint_file("deit"), "--target", "onnx", "--no-benchmark", "-o", "/proc/castling")
    assert run.code == 2 and "cannot write" in run.err and "Traceback" not in run.err


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, checkpoint_file: Files) -> None:
    """A limit on the size of a file stands for the full disk: the model does not fit, the write fails half-way."""
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from castling_deploy.cli import main\nmain()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "export", "--target", "onnx", "--no-benchmark", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.returncode == 2 and "cannot write" in process.stderr, process.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(how: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from castling_deploy.cli import main; main()",
            "export",
            "--target",
            "onnx,coreml",
            "-o",
            str(tmp_path),
        ],
        stderr=subprocess.PIPE,
        env=ISOLATED,
        # tests that run in a shell's background are born with SIGINT ignored, and so would be this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".*.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"interrupted" in err and b"Traceback" not in err
    assert not any(tmp_path.glob(".*")), "half a folder was left"


def test_dry_run_says_what_would_be_done_and_does_nothing(tmp_path: Path) -> None:
    run = castling("export", "--target", "onnx,coreml", "--dry-run", "--json", "-o", tmp_path / "out")
    assert run.code == 0 and [row["target"] for row in run.document["dry_run"]] == ["onnx", "coreml"]
    assert os.listdir(tmp_path) == []


def official_checkpoint(path: Path) -> Path:
    """A Castling-DeiT whose attention weights come from modules with the official constructor's names, by facebook's
    container."""
    network = small("deit")
    tensors = {name: value for name, value in network.state_dict().items() if ".attn." not in name}
    for block in range(SMALL_DEIT.depth):
        module = LinearAngularAttention(SMALL_DEIT.width, SMALL_DEIT.heads, qkv_bias=True)
        tensors.update({f"blocks.{block}.attn.{name}": value for name, value in module.state_dict().items()})
    torch.save({"model": tensors}, path)
    return path


@pytest.mark.parametrize("targets", ["onnx", pytest.param("all", marks=pytest.mark.slow)])
def test_a_users_checkpoint_goes_through_every_target(targets: str, tmp_path: Path) -> None:
    run = castling(
        "export",
        official_checkpoint(tmp_path / "best.pth"),
        "--target",
        targets,
        "--precision",
        "fp32",
        "--no-benchmark",
        "-o",
        tmp_path,
        "--json",
    )
    assert run.code == 0, run.err
    document = run.document
    assert document["model"]["name"] == "castling-deit-best" and document["checkpoint"]["peeled"] == [
        "container 'model'"
    ]
    assert {artifact["parity"]["verdict"] for artifact in document["artifacts"]} == {"pass"}
    assert document["cast"]["accuracy_cast"] is None, "no labels are known: null, not 0"


def test_a_network_that_says_the_same_of_every_image_is_inconclusive(tmp_path: Path) -> None:
    network = CastlingDeiT(SMALL_DEIT).eval()
    tensors = network.state_dict()
    tensors["head.weight"] = torch.zeros_like(tensors["head.weight"])
    torch.save(tensors, tmp_path / "untrained.pth")
    run = castling("export", tmp_path / "untrained.pth", "--target", "onnx", "--no-benchmark", "-o", tmp_path, "--json")
    assert run.code == 5
    (artifact,) = run.document["artifacts"]
    assert artifact["parity"]["verdict"] == "inconclusive" and artifact["parity"]["power"] == 0
    reason = "every image gives the same output: there is nothing to measure an error against"
    assert artifact["reason"] == f"parity inconclusive: {reason}" and f"inconclusive: {reason}" in run.err
    again = castling("verify", artifact["path"], "--json")
    assert again.code == 5 and is_two_lines(again)
    assert f"inconclusive: {artifact['path']}: golden images: logits" in again.err and reason in again.err


def test_a_single_golden_image_is_the_reason_that_verify_gives(folder: Path) -> None:
    for file in (folder / "golden").iterdir():
        np.save(file, np.load(file)[:1])
    with_golden(folder, 1)
    run = castling("verify", folder, "--json")
    assert run.code == 5 and "a single real image was compared" in run.err
    checks = [check for check in run.document["checks"] if check["decisive"] and check["verdict"] == "inconclusive"]
    assert [check["said"].partition(":")[0] for check in checks] == ["a single real image was compared"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--dynamic", "--opset", "21"],
        ["--imgsz", "48,64", "--batch-size", "4"],
        pytest.param(["--batch-size", "4"], marks=pytest.mark.slow),
        pytest.param(["--imgsz", "48,64"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_onnx_options_give_artefacts_that_pass(flags: list[str], tmp_path: Path, checkpoint_file: Files) -> None:
    run = castling(
        "export", checkpoint_file("levit"), "--target", "onnx", *flags, "--no-benchmark", "-o", tmp_path, "--json"
    )
    assert run.code == 0, run.err
    assert run.document["artifacts"][0]["parity"]["verdict"] == "pass"


def test_without_tensorrt_the_typed_graph_and_its_parity_are_kept_and_the_rest_is_explained(
    tmp_path: Path, checkpoint_file: Files
) -> None:
    code = (
        "import sys\nsys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None\n"
        "from castling_deploy.cli import main\nmain()"
    )
    arguments = ["export", str(checkpoint_file("deit")), "--target", "trt", "-o", str(tmp_path), "--json"]
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert process.returncode == 4, process.stderr
    (artifact,) = json.loads(process.stdout)["artifacts"]
    assert artifact["status"] == "unavailable" and artifact["parity"]["verdict"] == "pass"
    assert "model.onnx" in artifact["files"] and "model.engine" not in artifact["files"]
    for text in ("pip install 'castling-deploy[tensorrt-rtx]'", "trtexec --onnx=model.onnx"):
        assert text in artifact["reason"] and text in process.stderr
        assert text in (Path(artifact["path"]) / "README.md").read_text()


def test_machines_read_one_document_and_people_read_stages_and_a_table(tmp_path: Path, checkpoint_file: Files) -> None:
    run = castling("export", checkpoint_file("deit"), "--target", "onnx", "--no-benchmark", "-o", tmp_path, "--json")
    json.loads(run.out)
    for text in ("read and identify", "onnx: export fp32", "onnx: verify", "error / spread", "castling verify"):
        assert text in run.err
    silent = castling("inspect", checkpoint_file("deit"))
    assert silent.out == ""


@pytest.mark.parametrize("name", ["deit", "levit"])
def test_inspect_tells_size_work_cast_and_folds(name: str, checkpoint_file: Files) -> None:
    run = castling("inspect", checkpoint_file(name), "--json")
    document = run.document
    assert run.code == 0 and document["card"]["family"] == f"castling-{name}"
    assert document["trained"]["macs"] > document["castled"]["macs"] > 0
    assert document["rules"]["attention constants"] == len(document["layers"])
    assert ("attention_biases" in " ".join(document["dead"])) == (name == "levit")
    assert "can vanish" in run.err


@pytest.mark.parametrize(("network", "title", "reason"), [
    ("deit-softmax", "deit (deit, classification;", "softmax baseline: nothing to cast"),
    ("picodet", "picodet-picodet (picodet, detection;", "no attention: nothing to cast"),
])  # fmt: skip
def test_inspect_says_where_there_is_nothing_to_cast(network: str, title: str, reason: str, tmp_path: Path) -> None:
    tensors = (dense if network == "picodet" else small)(network).state_dict()
    torch.save(tensors, tmp_path / f"{network}.pth")
    model = ["--model", "deit"] if network == "deit-softmax" else ["--imgsz", "64,96"]
    run = castling("inspect", tmp_path / f"{network}.pth", *model)
    said = " ".join(run.err.split())
    assert run.code == 0 and title in said and reason in said
    assert "what the cast removes" not in said and "castling-deit" not in said


def test_doctor_tells_every_target_and_how_to_mend_it() -> None:
    run = castling("doctor", "--json")
    assert run.code == 0
    names = {target["target"] for target in run.document["targets"]}
    assert names == {"onnx", "tensorrt", "coreml", "coreai", "executorch"}
    assert {"coreai-core", "coreai-torch"} <= run.document["tools"].keys()
    assert all(
        target["missing"] is None or "pip install" in target["missing"]["fix"] for target in run.document["targets"]
    )


def test_doctor_says_in_words_who_is_who_and_needs_no_torch_for_it() -> None:
    run = without_torch("doctor", "--json")
    assert run.code == 0, run.err
    rows = {line.split()[0]: line for line in run.err.splitlines() if "\u2502" in line and line.split()}
    assert sum(line.startswith("arm64 ") for line in run.err.splitlines() if "\u2502" in line) == 1
    assert "onnx, executorch" in rows["arm64"] and "(fp16)" in rows["ort-fp16"]
    assert all(runner["about"] for runner in run.document["runners"])
    assert run.err.index("targets: ") < run.err.index("witnesses: ")


def test_bench_times_a_folder(folder: Path) -> None:
    run = castling("bench", folder, "--json")
    assert run.code == 0 and run.document["latency"][0]["median_s"] > 0


def test_verify_does_not_pass_what_failed_at_its_export(folder: Path) -> None:
    reseal(folder, parity="fail")
    run = castling("verify", folder, "--json")
    assert run.code == 3 and "the manifest's parity is fail, and that of parity.json pass" in run.err
    assert is_two_lines(run)
    assert run.document["verdict"] == "fail", "one document, in a failure too"


def test_verify_and_export_print_the_same_shapes(folder: Path, checkpoint_file: Files) -> None:
    document = castling("verify", folder, "--checkpoint", checkpoint_file("deit"), "--json").document
    parity = json.loads((folder / "parity.json").read_text())
    assert document["parity"].keys() == parity.keys() and document["parity"]["verdict"] == document["verdict"] == "pass"
    assert document["golden"].keys() == parity["witnesses"][0].keys()


@pytest.mark.parametrize(
    "manifest", [{"target": 5}, {"precision": "fp8"}, {"precision": 5}, {"inputs": 3}, {"noise_rel": None}]
)
def test_a_damaged_manifest_is_a_clear_error(manifest: dict[str, object], folder: Path) -> None:
    reseal(folder, **manifest)
    run = castling("verify", folder)
    assert run.code == 2 and is_two_lines(run)


@pytest.mark.parametrize("document", [{}, {"model": {}}, []])
def test_a_manifest_without_a_schema_says_what_is_missing_and_what_mends_it(document: object, folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps(document))
    run = castling("verify", folder)
    assert run.code == 2 and is_two_lines(run)
    assert "names no 'schema'" in run.err and "put the manifest.json of the export back" in run.err


def test_a_manifest_without_its_files_says_so(folder: Path) -> None:
    manifest = manifest_of(folder)
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = castling("verify", folder)
    assert run.code == 2 and is_two_lines(run) and "it lacks 'files'" in run.err


def test_an_artefact_behind_a_symlink_is_replaced_without_touching_what_it_points_to(
    folder: Path, tmp_path: Path, checkpoint_file: Files
) -> None:
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = (elsewhere / "manifest.json").read_bytes()
    run = castling(
        "export", checkpoint_file("deit"), "--target", "onnx", "--no-benchmark", "--overwrite", "-o", tmp_path
    )
    assert run.code == 0, run.err
    assert not folder.is_symlink() and (elsewhere / "manifest.json").read_bytes() == before
    assert not any(tmp_path.glob(".*"))


def test_paths_with_brackets_and_spaces_are_printed_as_they_can_be_typed(
    tmp_path: Path, checkpoint_file: Files
) -> None:
    out = tmp_path / "out [bold] x"
    run = castling("export", checkpoint_file("deit"), "--target", "onnx", "--no-benchmark", "-o", out)
    assert run.code == 0 and f"castling verify '{out}" in run.err


def test_an_interrupt_before_torch_is_there_is_one_json_document_too() -> None:
    code = (
        "import sys\nfrom castling_deploy import cli, request\n"
        "def interrupt(request):\n    raise KeyboardInterrupt\n"
        "request.plan = interrupt\nsys.modules['torch'] = None\n"
        "sys.exit(cli.run(cli.castling, ['export', '--target', 'onnx', '--json'], 'castling'))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 130 and json.loads(process.stdout)["error"]["exit_code"] == 130


def test_closed_streams_are_no_crash(checkpoint_file: Files) -> None:
    command = f"{sys.executable} -c 'from castling_deploy.cli import main; main()' doctor"
    for streams in (">&-", "2>&-", ">&- 2>&-"):
        assert subprocess.run(["bash", "-c", f"{command} {streams}"], capture_output=True).returncode == 0
