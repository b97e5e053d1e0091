"""The gate is tested: defects that exports really have are planted, and every one of them must be caught.

Each is planted in the network that is handed to a real exporter; the artefact is run by its real witness and compared
with the untouched reference, as in every export.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from defects import DEIT, GROSS, LEVIT, ON_FOLDED, ON_LEVIT, Defect, deep, tanh_gelu
from torch import nn

from castling_deploy import bundled
from castling_deploy.artifact import network_for
from castling_deploy.checkpoint import read
from castling_deploy.identify import ModelCard, identify
from castling_deploy.ladder import Ladder, climb
from castling_deploy.parity import ParityReport, Verdict
from castling_deploy.probes import probes_for
from castling_deploy.target import Precision, target_named
from castling_deploy.task import task_named
from castling_deploy.verification import verify_artifact

DENSE = tuple(name for name in bundled.CHECKPOINTS if name not in (LEVIT, DEIT))
# Every defect in one of the classifiers, and one in ten in each of the dense networks too: the rest is slow.
EVERY = {LEVIT: 2, DEIT: 2} | dict.fromkeys(DENSE, 10)
PLANTED = [
    pytest.param(defect, name, marks=() if (index + offset) % every == 0 else pytest.mark.slow)
    for index, defect in enumerate(ON_FOLDED)
    for offset, (name, every) in enumerate(EVERY.items())
]
Bundled = Callable[[str], tuple[nn.Module, ModelCard, Ladder]]


@pytest.fixture(scope="module")
def trained() -> Bundled:
    """A bundled network with its ladder on 24 digits and the structured images, climbed once."""
    known: dict[str, tuple[nn.Module, ModelCard, Ladder]] = {}

    def get(name: str) -> tuple[nn.Module, ModelCard, Ladder]:
        if name not in known:
            network, card = identify(read(bundled.checkpoint_path(name)))
            probes = probes_for(card.preprocessing, card.samples).few(24)
            known[name] = network, card, climb(network, task_named(card.task), card.outputs, probes)
        return known[name]

    return get


def verified(
    mutant: nn.Module,
    card: ModelCard,
    ladder: Ladder,
    folder: Path,
    name: str = "onnx",
    precision: Precision = Precision.FP32,
) -> ParityReport:
    target = target_named(name)
    artifact = target.export(network_for(card, mutant, 1), precision, target.options(), folder)
    return verify_artifact(target, artifact, folder, ladder, precision)


@pytest.mark.parametrize(("defect", "network"), PLANTED)
def test_a_defect_in_the_exported_network_is_caught(
    defect: Defect, network: str, trained: Bundled, tmp_path: Path
) -> None:
    _, card, ladder = trained(network)
    assert verified(defect(deep(ladder.folded)), card, ladder, tmp_path).verdict is Verdict.FAIL


@pytest.mark.parametrize("defect", ON_LEVIT)
def test_a_defect_in_the_fold_is_caught(defect: Defect, trained: Bundled, tmp_path: Path) -> None:
    network, card, ladder = trained(LEVIT)
    assert verified(defect(network), card, ladder, tmp_path).verdict is Verdict.FAIL


def test_an_approximate_gelu_is_caught(trained: Bundled, tmp_path: Path) -> None:
    _, card, ladder = trained(DEIT)
    assert verified(tanh_gelu(deep(ladder.folded)), card, ladder, tmp_path).verdict is Verdict.FAIL


@pytest.mark.parametrize("defect", GROSS)
@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_gross_defects_are_caught_in_fp16_too(target: str, defect: Defect, trained: Bundled, tmp_path: Path) -> None:
    _, card, ladder = trained(LEVIT)
    report = verified(defect(deep(ladder.folded)), card, ladder, tmp_path, target, Precision.FP16)
    assert report.verdict is Verdict.FAIL


@pytest.mark.parametrize("network", bundled.CHECKPOINTS)
def test_the_untouched_network_is_no_false_alarm(network: str, trained: Bundled, tmp_path: Path) -> None:
    _, card, ladder = trained(network)
    assert verified(deep(ladder.folded), card, ladder, tmp_path).verdict is Verdict.PASS
