"""Artefacts that somebody edited after their export, hashes mended: `castling verify` tells by the content alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from edits import EDITS, manifest_of

import castling_deploy
from castling_deploy.errors import CastlingError
from castling_deploy.parity import Verdict
from castling_deploy.rechecking.recheck import verify


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = castling_deploy.export(castling_deploy.load(), target="onnx", output=tmp_path_factory.mktemp("out"))
    assert result.path is not None
    return result.path


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


def test_the_untouched_artefact_passes(artifact: Path) -> None:
    assert verify(artifact).verdict is Verdict.PASS and manifest_of(artifact)["parity"] == "pass"
