"""Softmax baselines against timm's networks on the same weights: our wiring is the published one."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from networks import conditioned

from castling_deploy.fold import fold
from castling_deploy.models.family import family_of


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("deit_tiny_patch16_224", "deit-tiny"),
        ("deit_tiny_distilled_patch16_224", "deit-tiny-distilled"),
        ("levit_128s", "levit-128s"),
        ("levit_192", "levit-192"),
        ("mvitv2_tiny", "mvitv2-tiny"),
    ],
)
@torch.no_grad()
def test_baselines_compute_what_timm_computes_from_the_same_tensors(timm: ModuleType, theirs: str, ours: str) -> None:
    reference = conditioned(timm.create_model(theirs, pretrained=False)).double()
    tensors = {name: value for name, value in reference.state_dict().items() if "num_batches_tracked" not in name}
    family = family_of(tensors, softmax=True)
    config = family.config_of(tensors, None, 0.02)
    assert config == family.variants[ours]
    network = family.build(config).double().eval()
    assert tensors.keys() == {name for name in network.state_dict() if "num_batches_tracked" not in name}
    network.load_state_dict(tensors, strict=False)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference(images)
    for form in (network, fold(network)):
        assert (form(images) - expected).abs().max() < 1e-10 * expected.abs().max()
