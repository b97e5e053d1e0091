"""What no trained network stands for, on every target with random weights: detectors and segmenters of every family
(eight outputs, or a map of them), and softmax baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from networks import BASELINES, DENSE, dense, small
from safetensors.torch import save_file
from torch import nn

from castling_deploy.parity import Verdict
from castling_deploy.pipeline import Deployment, deploy
from castling_deploy.request import Request
from castling_deploy.target import TARGETS

EVERY = tuple(TARGETS)
MODEL = {"deit-softmax": "deit", "levit-softmax": "levit", "mvit-softmax": "mvitv2"}  # what --model calls them


def made_of(
    network: nn.Module, size: tuple[int, int], folder: Path, targets: tuple[str, ...], **asked: str
) -> Deployment:
    """`network`, written to a file and exported in float32; every artefact holds its outputs."""
    file = folder / "network.safetensors"
    tensors = {key: value.contiguous() for key, value in network.state_dict().items() if "num_batches" not in key}
    save_file(tensors, file, metadata={"castling": json.dumps({"image_size": size})})
    made = deploy(Request(targets, file, precision="fp32", output=folder, benchmark=False, **asked))  # type: ignore[arg-type]
    # random convolutions, thirty in a row, may multiply rounding errors beyond what float32 can be judged on
    allowed = {Verdict.PASS, Verdict.INCONCLUSIVE} if made.card.family == "picodet" else {Verdict.PASS}
    for result in made.results:
        assert result.error is None and result.parity is not None, result
        assert result.parity.power >= 0.95
        assert result.parity.verdict in allowed, result.parity.rungs
        (witness,) = result.parity.witnesses
        assert all(output.cosine is not None and output.cosine > 1 - 1e-6 for output in witness.outputs)
    return made


@pytest.mark.parametrize(
    ("name", "targets"),
    [("picodet", ("onnx",)), *(pytest.param(name, EVERY, marks=pytest.mark.slow) for name in DENSE)],
)
def test_every_dense_family_goes_to_every_target(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    made = made_of(dense(name), DENSE[name][1].image_size, tmp_path, targets)
    assert made.card.family == DENSE[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_goes_to_every_target(name: str, tmp_path: Path) -> None:
    made = made_of(small(name), BASELINES[name][1].image_size, tmp_path, EVERY, model=MODEL[name])
    assert made.card.nothing_to_cast and not made.ladder.layers
