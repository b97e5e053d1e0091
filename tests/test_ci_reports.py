"""`castling verify` in CI: several folders, JUnit, SARIF and the job's summary, written whatever the verdict is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from deployments import ENVIRONMENT, Run, castling
from edits import reseal
from exported import CLASSIFIER, copied, exported

from castling_deploy import bundled
from castling_deploy.errors import TargetUnavailableError
from castling_deploy.parity import Verdict
from castling_deploy.rechecking.checks import Check, Examined
from castling_deploy.rechecking.ci_reports import junit_xml, markdown, sarif_json


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled network for ONNX."""
    return copied(exported(CLASSIFIER, "onnx", "fp32"), tmp_path_factory.mktemp("ci"))


@pytest.fixture(scope="module")
def changed(artifact: Path) -> Path:
    """A copy whose model was changed after the export."""
    copy = artifact.with_name("changed")
    shutil.copytree(artifact, copy)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    return copy


@pytest.fixture(scope="module")
def undecided(artifact: Path) -> Path:
    """A copy of which the export itself was in doubt."""
    copy = artifact.with_name("undecided")
    shutil.copytree(artifact, copy)
    parity = json.loads((copy / "parity.json").read_text())
    (rung,) = (rung for rung in parity["rungs"] if rung["name"] == "lowered")
    rung["verdict"] = parity["verdict"] = "inconclusive"
    (copy / "parity.json").write_text(json.dumps(parity))
    told = (copy / "README.md").read_text()
    mark = "> **Parity: inconclusive.** Do not ship this artefact.\n\n"
    (copy / "README.md").write_text(told.replace("Witnesses:", f"{mark}Witnesses:", 1))
    reseal(copy, parity="inconclusive")
    return copy


@pytest.fixture(scope="module")
def several(artifact: Path, changed: Path, undecided: Path) -> Run:
    """All three at once, with reports beside them."""
    folder = artifact.parent
    return castling(
        "verify",
        changed,
        artifact,
        undecided,
        "--junit",
        folder / "deep" / "junit.xml",
        "--sarif",
        folder / "x.sarif",
        "--json",
    )


def outcomes(suite: ElementTree.Element) -> dict[str, str]:
    """Every case of a suite and how it ended."""
    return {
        f"{str(case.get('classname')).partition(': ')[2]}: {case.get('name')}": case[0].tag if len(case) else "passed"
        for case in suite.iter("testcase")
    }


def test_all_folders_are_checked_and_the_gravest_exit_code_wins(several: Run, artifact: Path) -> None:
    assert several.code == 3, several.err
    verdicts = [(one["verdict"], one["exit_code"]) for one in several.document["artifacts"]]
    assert verdicts == [(None, 3), ("pass", 0), ("inconclusive", 5)]
    assert several.document["artifacts"][0]["error"]["message"].endswith("model.onnx")
    assert f"pass: {artifact} computes what PyTorch computes on 12 golden images (worst " in several.err
    assert " of 1e-04, run by onnxruntime " in several.err and "not run again" in several.err
    assert "inconclusive: " in several.err and "fail: " not in several.err, "the error says what was changed"
    assert castling("verify", artifact, artifact).code == 0


def test_junit_has_a_case_for_every_rung_and_every_output_of_every_witness(several: Run, artifact: Path) -> None:
    root = ElementTree.parse(artifact.parent / "deep" / "junit.xml").getroot()
    changed, passed, undecided = root
    assert root.tag == "testsuites" and {suite.tag for suite in root} == {"testsuite"}
    assert outcomes(changed) == {"files: could be checked": "failure"}
    cases = outcomes(passed)
    assert set(cases.values()) == {"passed"}
    for name in ("at its export: rung cast", "at its export: rung fold", "at its export: rung exported"):
        assert name in cases
    assert {name.partition(", by ")[0] for name in cases if ", by " in name} == {
        "golden images: logits",
        "at its export: logits",
    }
    doubtful = {name for name, outcome in outcomes(undecided).items() if outcome != "passed"}
    assert doubtful == {"at its export: verdict", "at its export: rung lowered"}
    for element in (root, *root):
        for count, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(str(element.get(count))) == len(list(element.iter(tag)))


def is_sarif(document: Any) -> bool:
    """What SARIF 2.1.0 requires, of the parts that are used."""
    assert document["version"] == "2.1.0" and document["$schema"].startswith("https://")
    (run,) = document["runs"]
    driver = run["tool"]["driver"]
    rules = [rule["id"] for rule in driver["rules"]]
    assert driver["name"] and len(set(rules)) == len(rules)
    assert all(isinstance(call["executionSuccessful"], bool) for call in run["invocations"])
    for result in run["results"]:
        assert result["message"]["text"] and result["level"] in ("none", "note", "warning", "error")
        assert rules[result["ruleIndex"]] == result["ruleId"]
        for location in result["locations"]:
            physical = location["physicalLocation"]
            assert " " not in physical["artifactLocation"]["uri"] and physical["region"]["startLine"] >= 1
    return True


def test_sarif_has_a_result_for_everything_that_did_not_pass(several: Run, artifact: Path) -> None:
    document = json.loads((artifact.parent / "x.sarif").read_text())
    assert is_sarif(document)
    found = [(result["ruleId"], result["level"]) for result in document["runs"][0]["results"]]
    assert found == [("parity-failed", "error"), *[("parity-inconclusive", "warning")] * 2]


def test_sarif_of_a_pass_has_no_results_and_paths_are_relative_to_the_repository(
    artifact: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact.parent)
    document = json.loads(sarif_json([Examined(artifact, (Check("files", "x", Verdict.PASS),))]))
    assert is_sarif(document) and document["runs"][0]["results"] == []
    failed = Examined(Path("a b"), (Check("golden images", "logits", Verdict.FAIL, True, 0.5, 1e-4),))
    (result,) = json.loads(sarif_json([failed]))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20b/parity.json"
    assert result["message"]["text"] == "a b: logits: fail: error / spread 5.0e-01, limit 1e-04"
    assert failed.reason == "golden images: logits: error / spread 5.0e-01, limit 1e-04"


def test_a_job_summary_is_appended_where_github_asks_for_one(
    artifact: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setitem(ENVIRONMENT, "GITHUB_STEP_SUMMARY", str(summary))
    assert castling("verify", artifact, changed).code == 3
    text = summary.read_text()
    assert text.startswith("before\n### castling verify")
    assert f"| {artifact} | pass |" in text and f"| {changed} | **not checked** |" in text
    assert "- changed: '" in text and "model.onnx" in text


def test_one_folder_that_cannot_be_checked_is_reported_and_one_json_document(tmp_path: Path) -> None:
    run = castling("verify", tmp_path / "none", "--junit", tmp_path / "junit.xml", "--json")
    assert run.code == 2 and run.document["error"]["exit_code"] == 2
    (case,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")
    assert case[0].tag == "error" and "no artefact folder" in str(case[0].get("message"))


def test_with_the_checkpoint_the_rungs_are_climbed_again(artifact: Path, tmp_path: Path) -> None:
    checkpoint = bundled.checkpoint_path(bundled.DEFAULT)
    run = castling("verify", artifact, "--checkpoint", checkpoint, "--junit", tmp_path / "junit.xml")
    assert run.code == 0, run.err
    cases = outcomes(ElementTree.parse(tmp_path / "junit.xml").getroot())
    assert "373 images: rung fold" in cases and not any("at its export" in name for name in cases)
    assert cases["373 images: rung lowered"] == "passed"
    assert "run again now, on 373 images" in run.err and "compared with the checkpoint" in run.err
    assert f"pass: {artifact} computes what PyTorch computes on 373 images (worst " in run.err


def test_what_decides_nothing_is_skipped_and_what_could_not_run_is_an_error() -> None:
    cast = Check("at its export", "rung cast", Verdict.INCONCLUSIVE, False, 0.3, None)
    absent = Examined(Path("b"), error=TargetUnavailableError("no runtime", hint="pip install it"))
    first, second = ElementTree.fromstring(junit_xml([Examined(Path("a"), (cast,)), absent]))
    assert list(outcomes(first).values()) == ["skipped"] and list(outcomes(second).values()) == ["error"]
    (result,) = json.loads(sarif_json([absent]))["runs"][0]["results"]
    assert result["ruleId"] == "artefact-unchecked" and "pip install it" in result["message"]["text"]


def test_names_with_markup_and_control_characters_break_no_report() -> None:
    odd = Examined(Path("a|b<c>&\x07\udcff"), (Check('g"', "x\x00\ny|z", Verdict.FAIL),))
    (case,) = ElementTree.fromstring(junit_xml([odd])).iter("testcase")
    assert case.get("classname") == 'a|b<c>&??: g"'
    assert is_sarif(json.loads(sarif_json([odd])))
    row = markdown([odd]).decode().splitlines()[4]
    assert row.replace("\\|", "").count("|") == 5 and "<c>" not in row


@pytest.mark.parametrize("where", ["junit.xml", "golden/junit.xml"])
def test_a_report_inside_the_artefact_would_change_it_and_is_refused(where: str, artifact: Path) -> None:
    run = castling("verify", artifact, "--junit", artifact / where)
    assert run.code == 2 and "beside the folder" in run.err and not (artifact / where).exists()


def test_two_reports_in_one_file_and_a_report_that_cannot_be_written_are_clear_errors(
    artifact: Path, tmp_path: Path
) -> None:
    run = castling("verify", artifact, "--junit", tmp_path / "x", "--sarif", tmp_path / "x")
    assert run.code == 2 and "two reports" in run.err
    (tmp_path / "file").write_text("")
    run = castling("verify", artifact, "--junit", tmp_path / "file" / "x", "--json")
    assert run.code == 2 and "cannot write" in run.err and run.document["error"]["exit_code"] == 2
