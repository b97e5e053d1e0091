"""The shape of the house: who may import whom, what a bare import may load, what the wheel holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from castling_deploy.models.family import FAMILIES, family_named
from castling_deploy.runner import RUNNERS
from castling_deploy.target import TARGETS, target_named

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "coremltools",
    "coreai",
    "coreai_torch",
    "executorch",
    "tensorrt",
    "tensorrt_rtx",
    "numpy",
    "rich",
)
MODELS_MAY = {"errors", "suggest", "castle", "fold", "rewrite", "models", "verbs"}
WITNESSES_MAY = {
    "cache",
    "eight_bits",
    "errors",
    "execution",
    "export",
    "folder",
    "quiet",
    "runner",
    "target",
    "witnesses",
}
EXPORT_MAY = {
    "eight_bits",
    "errors",
    "facts",
    "fold",
    "palette",
    "plain",
    "suggest",
    "target",
    "traces",
    "preprocessing",
    "detection",
    "export",
    "verbs",
}


def imports_of(path: Path) -> set[str]:
    """First components below castling_deploy that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("castling_deploy"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("castling_deploy.")}
    return found


@pytest.mark.parametrize(("folder", "allowed"), [("models", MODELS_MAY), ("export", EXPORT_MAY)])
def test_models_and_exporters_know_only_what_they_need(folder: str, allowed: set[str]) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert imports_of(path) <= allowed, f"{path.name} imports {sorted(imports_of(path) - allowed)}"


def test_witnesses_know_only_what_they_need() -> None:
    for path in (ROOT / "castling_deploy" / "witnesses").glob("*.py"):
        assert imports_of(path) <= WITNESSES_MAY, f"{path.name} imports {sorted(imports_of(path) - WITNESSES_MAY)}"


def test_the_pipeline_knows_no_format_and_no_family() -> None:
    names = [*TARGETS, *FAMILIES, "mlpackage", "pte", "engine"]
    for file in (
        "pipeline.py",
        "verification.py",
        "execution.py",
        "ladder.py",
        "parity.py",
        "undecided.py",
        "artifact.py",
        "console.py",
        "report.py",
        "rechecking/recheck.py",
        "rechecking/claims.py",
        "rechecking/golden.py",
        "rechecking/texts.py",
        "facts.py",
        "readme.py",
        "localising/cases.py",
        "localising/cut.py",
        "localising/fault.py",
        "localising/findings.py",
        "localising/localisation.py",
        "localising/localise.py",
        "localising/prefix.py",
        "localising/rebuilt.py",
        "localising/references.py",
        "localising/repro.py",
        "localising/search.py",
        "localising/suspects.py",
        "localising/trials.py",
        "localising/wide.py",
        "isolation.py",
        "rechecking/console_checks.py",
        "rechecking/saved.py",
        "rechecking/comparison.py",
        "rechecking/rejudge.py",
        "rechecking/checks.py",
        "rechecking/ci_reports.py",
        "latency.py",
    ):
        text = (ROOT / "castling_deploy" / file).read_text().lower()
        words = {word for word in names if word in text.replace("_", " ").split()}
        assert not words, f"{file} names {words}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "module",
    [
        "castling_deploy",
        "castling_deploy.cli",
        "castling_deploy.models",
        "castling_deploy.target",
        *(entry.partition(":")[0] for entry in (*TARGETS.values(), *RUNNERS)),
    ],
)
def test_importing_loads_no_toolchain(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])").split()
    assert loaded == []


def test_verbs_can_be_called_and_their_modules_still_be_imported() -> None:
    run_python(
        "import castling_deploy, castling_deploy.castle, castling_deploy.fold, castling_deploy.export\n"
        "from castling_deploy.castle import castle\n"
        "from castling_deploy.models import castlify\n"
        "import castling_deploy.models.castlify\n"
        "assert callable(castlify) and castlify is castling_deploy.models.castlify\n"
        "assert callable(castling_deploy.castle) and callable(castling_deploy.export)\n"
        "assert castling_deploy.fold.fold and castling_deploy.load and castling_deploy.open"
    )


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_keeps_the_protocol_without_its_toolchain(name: str) -> None:
    """In an interpreter where no toolchain can be imported, a target still says what is missing and how to mend it."""
    code = (
        f"import sys\nfor name in {HEAVY!r}:\n    sys.modules[name] = None\n"
        f"from castling_deploy.target import target_named\ntarget = target_named({name!r})\n"
        "assert target.precisions and target.options() is not None and target.witness().name\n"
        "print(target.missing(), target.unfinished())"
    )
    assert run_python(code)


def test_every_family_keeps_the_protocol() -> None:
    for name in FAMILIES:
        family = family_named(name)
        assert family.name == name and family.variants and family.reference and family.title


def test_aliases_and_registry_resolve() -> None:
    for name in ("trt", "engine", "mlpackage", "ios", "pte", "aimodel", " ONNX "):
        assert target_named(name).name in TARGETS


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Names in the wheel and in the sdist, built from the files that git would ship."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        env={**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": "0"},
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as tar:
        return archive.namelist(), tar.getnames()


def test_the_wheel_holds_both_trees_the_checkpoints_and_nothing_else(
    distributions: tuple[list[str], list[str]],
) -> None:
    wheel, sdist = distributions
    for folder, package in (("models", "castling_deploy/models"), ("export", "castling_deploy/export")):
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package}/{path.name}" in wheel
            assert any(name.endswith(f"{folder}/{path.name}") for name in sdist)
    for path in (ROOT / "castling_deploy").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in wheel, f"{path} is of a package that pyproject.toml does not list"
    for path in (ROOT / "castling_deploy" / "bundled").iterdir():
        assert f"castling_deploy/bundled/{path.name}" in wheel
    for path in (ROOT / "castling_deploy" / "selftests" / "templates").glob("*.*"):
        assert f"castling_deploy/selftests/templates/{path.name}" in wheel
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"castling_deploy"}


def test_bundled_checkpoints_are_small() -> None:
    for path in (ROOT / "castling_deploy" / "bundled").glob("*.safetensors"):
        assert path.stat().st_size <= 2_500_000
