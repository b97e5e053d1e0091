"""Artefacts that somebody edited after their export, hashes mended: `castling verify` tells by the content alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from edits import EDITS, manifest_of, reseal
from exported import exported

import castling_deploy
from castling_deploy.errors import CastlingError
from castling_deploy.parity import Verdict
from castling_deploy.progress import Silent
from castling_deploy.rechecking import claims
from castling_deploy.rechecking.checks import examine
from castling_deploy.rechecking.recheck import verify

DEIT = "castling-deit-digits"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = castling_deploy.export(castling_deploy.load(), target="onnx", output=tmp_path_factory.mktemp("out"))
    assert result.path is not None
    return result.path


# What the check says that an edit of a claim fails by.
NAMED = {
    "target_relabelled": "manifest's target is not the one",
    "input_renamed": "manifest's inputs are picture",
    "input_with_another_batch": "manifest's inputs are image float32 [2, 3, 128, 128], and the files declare image",
    "input_of_another_dtype": "manifest's inputs are image float64",
    "input_with_another_layout": "manifest's interface is not the one",
    "output_reshaped": "manifest's outputs are logits float32 [1, 10, 1], and the files declare logits float32 [1, 10]",
    "output_with_another_layout": "manifest's interface is not the one",
    "output_added": "manifest's outputs are logits float32 [1, 10], scores",
    "model_renamed": "manifest's model is not the one",
    "family_relabelled": "manifest's family is not the one",
    "task_relabelled": "manifest's task is not the one",
    "classes_miscounted": "manifest's classes is not the one",
    "a_label_dropped": "manifest's labels is not the one",
    "options_relabelled": "manifest's options is not the one",
    "details_edited": "another opset than the files",
    "tools_relabelled": "manifest's tools have torch 1.13.0",
    "golden_limit_loosened": "manifest's golden spreads and limits",
    "golden_spreads_loosened": "manifest's golden spreads and limits",
    "flat_images_called_real": "the first 12 golden images are not the real ones",
    "noise_exaggerated": "manifest's noise_rel of logits is not that of parity.json",
    "parity_limit_loosened": "parity.json: exported is judged by a limit of 0.01, and has one of 0.0001",
    "parity_spread_loosened": "parity.json's spread of logits",
    "parity_with_a_smaller_error": "parity.json: exported is not what its witnesses come to",
    "selftest_that_always_passes": "selftest/selftest.py is not what was generated",
    "readme_with_another_error": "README.md is not what was generated",
    "readme_that_loads_something_else": "README.md loads the artefact in another way",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_no_edit_passes(edit: Callable[[Path], None], artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
    edit(copy)
    try:
        verdict = verify(copy).verdict
    except CastlingError as error:
        assert error.exit_code in (2, 3), error
    else:
        assert verdict is Verdict.FAIL


@pytest.mark.parametrize("name", NAMED)
def test_an_edited_claim_fails_by_its_name(name: str, artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
    EDITS[name](copy)
    seen = examine(copy, None, Silent())
    assert seen.exit_code == 3
    assert any(NAMED[name] in (check.said or "") for check in seen.checks if check.verdict is Verdict.FAIL)


def test_another_networks_file_contradicts_before_it_is_run(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
    shutil.copy(exported(DEIT, "onnx", "fp32").path / "model.onnx", copy)
    reseal(copy)
    seen = examine(copy, None, Silent())
    assert seen.exit_code == 3 and seen.recheck is not None and seen.recheck.contradicted
    assert "the manifest's model is not the one that stands in the model's file" in [
        check.said for check in seen.checks
    ]


def test_a_file_that_another_target_writes_is_a_contradiction_without_its_toolchain(
    artifact: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
    reseal(copy, target="executorch")
    seen = examine(copy, None, Silent())
    assert seen.exit_code == 3
    assert "which writes model.pte" in str([check.said for check in seen.checks])


def test_a_file_that_cannot_be_read_is_bad_input(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
    model = copy / "model.onnx"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    reseal(copy)
    seen = examine(copy, None, Silent())
    assert seen.exit_code == 2 and "cannot be read" in str(seen.error)


def test_texts_of_another_version_are_not_compared(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
    EDITS["selftest_that_always_passes"](copy)
    monkeypatch.setattr(claims, "version", lambda package: "9.0")
    seen = examine(copy, None, Silent())
    (told,) = [check for check in seen.checks if check.name == "README and self-tests"]
    assert seen.exit_code == 0 and not told.decisive and "this is 9.0" in told.told


def test_the_untouched_artefact_passes(artifact: Path) -> None:
    assert verify(artifact).verdict is Verdict.PASS and manifest_of(artifact)["parity"] == "pass"
