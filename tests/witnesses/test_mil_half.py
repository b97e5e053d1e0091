"""float16 sums: rounding alone on a network that suits float16, and an overflow where a sum leaves it on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import CLASSIFIER, exported, outputs_of, passed, verdicts
from folded_networks import folded_network, images_for, network_of
from torch import nn

from castling_deploy.runner import OwnWitness, runners_of
from castling_deploy.target import Artifact, Precision, WitnessKind, target_named
from castling_deploy.witnesses.mil_half import MilHalf

pytest.importorskip("coremltools")
COREML = target_named("coreml")
PAIRS, OTHERS = 512, 8  # channels


def test_it_differs_from_the_evaluator_by_rounding_and_passes() -> None:
    folder = exported(CLASSIFIER, "coreml", "fp16")
    narrow, wide = outputs_of(MilHalf(), folder, 2), outputs_of(OwnWitness(COREML), folder, 2)
    assert narrow.keys() == wide.keys()
    error = np.abs(np.subtract(narrow["logits"], wide["logits"])).max() / np.abs(wide["logits"]).max()
    assert 2**-12 < error < 2e-2
    assert passed(verdicts(MilHalf(), folder, 2))


def test_a_float32_program_is_evaluated_as_it_is(tmp_path: Path) -> None:
    network = folded_network("deit")
    artifact = COREML.export(network, Precision.FP32, COREML.options(), tmp_path)
    images = images_for(network, 2)
    narrow, wide = (
        runner.run(tmp_path, artifact, images, lambda share: None) for runner in (MilHalf(), OwnWitness(COREML))
    )
    np.testing.assert_array_equal(narrow["logits"], wide["logits"])


@torch.no_grad()
def cancelling() -> nn.Module:
    """(B, 3, 32, 32) -> (B, 10): among the terms of the last sum 512 are near 200, and 512 near -200, after them."""
    torch.manual_seed(0)
    patch, last = nn.Conv2d(3, 2 * PAIRS + OTHERS, 32), nn.Linear(2 * PAIRS + OTHERS, 10)
    patch.weight[: 2 * PAIRS].zero_()
    assert patch.bias is not None
    patch.bias[: 2 * PAIRS].fill_(1.0)
    last.weight[:, :PAIRS].fill_(200.0)
    last.weight[:, PAIRS : 2 * PAIRS].fill_(-200.0)
    return nn.Sequential(patch, nn.Flatten(), last).eval()


def test_a_sum_that_leaves_float16_on_the_way_overflows_here_and_not_in_float32(tmp_path: Path) -> None:
    network = network_of(cancelling(), (32, 32))
    artifact: Artifact = COREML.export(network, Precision.FP16, COREML.options(), tmp_path)
    images = images_for(network, 2)
    narrow = MilHalf().run(tmp_path, artifact, images, lambda share: None)["logits"]
    wide = OwnWitness(COREML).run(tmp_path, artifact, images, lambda share: None)["logits"]
    with torch.no_grad():
        expected = network.module(torch.from_numpy(images)).numpy()
    assert not np.isfinite(narrow).any()
    assert np.abs(np.subtract(wide, expected)).max() < 2e-2 * np.abs(expected).max()


def test_it_is_a_reference_and_runs_core_ml_alone() -> None:
    runner = runners_of(COREML)["mil-fp16"]
    assert runner.missing() is None
    assert runner.witness().kind is WitnessKind.REFERENCE and "float16 sums" in runner.witness().name
    assert "mil-fp16" not in runners_of(target_named("onnx"))
