"""`castling diff`: two artefact folders side by side, from what their exports wrote; what is worse fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployments import castling

from castling_deploy.errors import UsageError
from castling_deploy.rechecking.comparison import Allowed, Comparison, Quantity, diff

Copies = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled network for ONNX, exported and timed once."""
    run = castling("export", "--target", "onnx", "--output", tmp_path_factory.mktemp("compared"), "--json")
    assert run.code == 0, run.err
    return Path(run.document["artifacts"][0]["path"])


@pytest.fixture
def copies(artifact: Path, tmp_path: Path) -> Copies:
    """Copies of it, to be made worse."""
    return lambda name: Path(shutil.copytree(artifact, tmp_path / name))


def change(path: Path, edit: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def quantity(comparison: Comparison, name: str) -> Quantity:
    (found,) = (quantity for quantity in comparison.quantities if quantity.name == name)
    return found


def slowed(folder: Path, factor: float) -> None:
    def edit(latency: Any) -> None:
        latency["artifact"]["median_s"] *= factor

    change(folder / "latency.json", edit)


def scored(folder: Path, points: float) -> None:
    def edit(parity: Any) -> None:
        parity["accuracy"]["artifact"] += points

    change(folder / "parity.json", edit)


def enlarged(folder: Path, factor: float) -> None:
    with (folder / "model.onnx").open("ab") as file:
        file.write(bytes(int((factor - 1) * (folder / "model.onnx").stat().st_size)))


def judged(folder: Path, verdict: str) -> None:
    def edit(document: Any) -> None:
        document["verdict" if "verdict" in document else "parity"] = verdict

    change(folder / "parity.json", edit)
    change(folder / "manifest.json", edit)


def test_an_artefact_is_no_worse_than_itself(artifact: Path) -> None:
    run = castling("diff", artifact, artifact, "--json")
    assert run.code == 0, run.err
    document = run.document
    assert document["differences"] == [] and document["regression"] is None and document["exit_code"] == 0
    assert {row["name"]: row["regressed"] for row in document["quantities"]} == {
        "power": None,
        "error / spread of logits": None,
        "top-1": False,
        "size": False,
        "latency, median": False,
        "latency, p95": None,
    }
    size = f"{(artifact / 'model.onnx').stat().st_size / 1e6:.2f} MB"
    assert "pass" in run.err and "98.33" in run.err and size in run.err and "ms" in run.err


@pytest.mark.parametrize(
    ("worsen", "amount", "allowed", "told"),
    [
        (slowed, 1.2, ["--max-slower", "21"], "latency, median +20 percent (allowed: 10)"),
        (enlarged, 1.06, ["--max-larger", "7"], "size +6 percent (allowed: 5)"),
        (scored, -0.6, ["--max-drop", "0.7"], "top-1 -0.6 points (allowed: 0.5)"),
    ],
)
def test_slower_larger_or_less_accurate_is_exit_6_beyond_what_is_allowed(
    worsen: Callable[[Path, float], None], amount: float, allowed: list[str], told: str, artifact: Path, copies: Copies
) -> None:
    worse = copies("worse")
    worsen(worse, amount)
    run = castling("diff", artifact, worse, "--json")
    assert run.code == 6 and run.document["exit_code"] == 6
    *_, error, hint = run.err.strip().splitlines()
    assert error == f"error: {told}" and "--max-" in hint
    assert castling("diff", artifact, worse, *allowed).code == 0
    assert diff(worse, artifact).regression is None, "better is no regression"


@pytest.mark.parametrize(("worsen", "amount"), [(slowed, 1.09), (enlarged, 1.04), (scored, -0.5)])
def test_within_what_is_allowed_nothing_regresses(
    worsen: Callable[[Path, float], None], amount: float, artifact: Path, copies: Copies
) -> None:
    worse = copies("worse")
    worsen(worse, amount)
    assert diff(artifact, worse).regression is None


@pytest.mark.parametrize(("before", "after"), [("pass", "inconclusive"), ("pass", "fail"), ("inconclusive", "fail")])
def test_a_worse_verdict_is_exit_3_and_graver_than_any_number(before: str, after: str, copies: Copies) -> None:
    good, bad = copies("good"), copies("bad")
    judged(good, before)
    judged(bad, after)
    slowed(bad, 2)
    error = diff(good, bad).regression
    assert error is not None and error.exit_code == 3
    assert error.message == f"parity was {before} and is {after}"
    assert not diff(bad, good).parity_regressed


def test_a_verdict_that_only_one_of_the_two_documents_tells_counts(artifact: Path, copies: Copies) -> None:
    for name in ("parity.json", "manifest.json"):
        bad = copies(name)
        change(bad / name, lambda document: document.update({"verdict": "fail", "parity": "fail"}))
        assert diff(artifact, bad).parity_regressed


def test_times_of_two_hosts_are_shown_and_not_compared(artifact: Path, copies: Copies) -> None:
    elsewhere = copies("elsewhere")
    slowed(elsewhere, 10)
    change(elsewhere / "latency.json", lambda latency: latency["host"].update(cpu="another"))
    comparison = diff(artifact, elsewhere)
    median = quantity(comparison, "latency, median")
    assert comparison.regression is None and median.regressed is None
    assert median.change is None and "another host" in str(median.remark)
    assert [difference.name for difference in comparison.differences] == ["latency: cpu"]


def test_what_was_not_measured_is_null_and_a_dash_and_no_regression(artifact: Path, copies: Copies) -> None:
    unknown = copies("unknown")
    (unknown / "latency.json").unlink()
    (unknown / "model.onnx").unlink()
    change(unknown / "parity.json", lambda parity: parity["accuracy"].update(artifact=None))
    run = castling("diff", artifact, unknown, "--json")
    rows = {row["name"]: row for row in run.document["quantities"]}
    assert run.code == 0
    for name in ("top-1", "size", "latency, median"):
        assert rows[name]["b"] is None and rows[name]["change"] is None and rows[name]["regressed"] is None
        assert rows[name]["remark"] == "not compared: the second is not known" and f"{name}: not compared" in run.err


def test_another_model_task_or_preprocessing_is_said_plainly(artifact: Path, copies: Copies) -> None:
    other = copies("other")

    def edit(manifest: Any) -> None:
        manifest["model"] |= {"name": "another", "task": "segmentation"}
        manifest["preprocessing"]["resize_kernel"] = "bicubic"

    change(other / "manifest.json", edit)
    change(other / "parity.json", lambda parity: parity["accuracy"].update(metric="mIoU", artifact=1.0))
    comparison = diff(artifact, other)
    assert [difference.name for difference in comparison.differences] == [
        "model",
        "task",
        "preprocessing: resize_kernel",
    ]
    assert quantity(comparison, "top-1 / mIoU").regressed is None, "two metrics are not compared"
    run = castling("diff", artifact, other)
    assert "preprocessing: resize_kernel: a has bilinear, b has bicubic" in run.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("parity.json", "{}"),
        ("parity.json", "no JSON"),
        ("latency.json", "[]"),
        ("latency.json", '{"artifact": {"median_s": 0, "p95_s": 1}}'),
    ],
)
def test_a_damaged_document_is_a_clear_error(name: str, content: str, artifact: Path, copies: Copies) -> None:
    damaged = copies("damaged")
    (damaged / name).write_text(content)
    with pytest.raises(UsageError, match=name):
        diff(artifact, damaged)


def test_nothing_is_allowed_where_zero_is(artifact: Path, copies: Copies) -> None:
    worse = copies("worse")
    scored(worse, -0.01)
    error = diff(artifact, worse, Allowed(drop_points=0)).regression
    assert error is not None and error.exit_code == 6
