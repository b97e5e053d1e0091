"""The workflow of docs/ci.md can be copied, and this repository's own is the same: both parse, and the command accepts
every castling line of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from castling_deploy.cli import castling
from castling_deploy.target import target_named

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "ci.md"
OWN = yaml.safe_load((ROOT / ".github" / "workflows" / "castling.yml").read_text())


def workflow() -> dict[Any, Any]:
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    loaded: dict[Any, Any] = yaml.safe_load(block)
    return loaded


def steps(job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workflow()["jobs"][job]["steps"]
    return found


def test_this_repository_runs_the_same_workflow() -> None:
    """Its own checkpoint and its own clone instead of a package; every other step is the guide's."""
    for job in ("export", "coreml"):
        guide, own = (
            [step for step in one if "pip install" not in step.get("run", "")]
            for one in (steps(job), OWN["jobs"][job]["steps"])
        )
        for step in guide:
            step.get("with", {}).pop("lfs", None)
        assert [{key: value for key, value in step.items() if value != {}} for step in guide] == own
    assert (ROOT / OWN["env"]["CHECKPOINT"]).is_file()
    assert {"run": ".ci/run"} in OWN["jobs"]["gate"]["steps"]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(job, arguments after `castling`) of every castling line, without the shell's redirections."""
    for job in workflow()["jobs"]:
        for step in steps(job):
            for line in step.get("run", "").replace("\\\n", " ").splitlines():
                words = shlex.split(line.partition(" > ")[0])
                if words and words[0] == "castling":
                    yield job, words[1:]


def test_the_workflow_has_what_github_asks_for() -> None:
    document = workflow()
    assert document["name"] and True in document, "YAML 1.1 reads the key `on` as true; GitHub does not"
    assert document["permissions"]["security-events"] == "write"
    for job in document["jobs"].values():
        assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert job.get("needs", "export") in document["jobs"]


@pytest.mark.parametrize(
    ("job", "arguments"), commands(), ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_the_command_accepts_every_line(job: str, arguments: list[str]) -> None:
    name, *rest = arguments
    command = castling.commands[name]
    with command.make_context(name, list(rest)) as context:
        assert isinstance(context, click.Context)
        for target in context.params.get("targets", ()):
            assert all(target_named(one).name == one for one in target.split(","))


def test_it_exports_verifies_compares_and_lets_core_ml_run_on_a_mac() -> None:
    said = [(job, arguments[0]) for job, arguments in commands()]
    assert {("export", "export"), ("export", "verify"), ("coreml", "verify"), ("regression", "diff")} <= set(said)
    assert workflow()["jobs"]["coreml"]["runs-on"].startswith("macos")


def test_reports_and_artefacts_are_uploaded_whatever_the_verdict_is() -> None:
    (verify,) = (arguments for job, arguments in commands() if (job, arguments[0]) == ("export", "verify"))
    written = {verify[verify.index(flag) + 1] for flag in ("--junit", "--sarif")}
    uploads = [step for step in steps("export") if "upload" in step.get("uses", "")]
    assert all("cancelled" in step["if"] for step in uploads)
    paths = " ".join(step["with"].get("path", step["with"].get("sarif_file", "")) for step in uploads).split()
    assert {"castling-out", "reports", "reports/castling.sarif"} <= set(paths)
    assert all(path.startswith("reports/") for path in written)
