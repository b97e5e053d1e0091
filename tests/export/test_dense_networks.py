"""Detectors and segmenters of every family on every target, with random weights: eight outputs, or a map of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from networks import DENSE, dense
from safetensors.torch import save_file

from castling_deploy.parity import Verdict
from castling_deploy.pipeline import deploy
from castling_deploy.request import Request
from castling_deploy.target import TARGETS


@pytest.mark.parametrize(
    ("name", "targets"),
    [("picodet", ("onnx",)), *(pytest.param(name, tuple(TARGETS), marks=pytest.mark.slow) for name in DENSE)],
)
def test_every_dense_family_goes_to_every_target(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / f"{name}.safetensors"
    config = DENSE[name][1]
    tensors = {key: value.contiguous() for key, value in dense(name).state_dict().items() if "num_batches" not in key}
    save_file(tensors, file, metadata={"castling": json.dumps({"image_size": config.image_size})})
    made = deploy(Request(targets, file, precision="fp32", output=tmp_path, benchmark=False))
    assert made.card.family == DENSE[name][0]
    for result in made.results:
        assert result.error is None and result.parity is not None, result
        assert result.parity.power >= 0.95
        # random convolutions, thirty in a row, may multiply rounding errors beyond what float32 can be judged on
        allowed = {Verdict.PASS, Verdict.INCONCLUSIVE} if "picodet" in name else {Verdict.PASS}
        assert result.parity.verdict in allowed, result.parity.rungs
        (witness,) = result.parity.witnesses
        assert all(output.cosine is not None and output.cosine > 1 - 1e-6 for output in witness.outputs)
