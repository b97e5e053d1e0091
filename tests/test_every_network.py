"""The main job on the other trained networks: every target, every precision, every task."""

from __future__ import annotations

import pytest
from every_artefact import Deployed, combinations, computes_what_pytorch_computes, has_the_promised_keys

from castling_deploy import bundled

OTHERS = [name for name in bundled.CHECKPOINTS if name != bundled.DEFAULT]


@pytest.mark.parametrize(("network", "target", "precision"), combinations(*OTHERS))
def test_every_artefact_computes_what_pytorch_computes(
    network: str, target: str, precision: str, deployed: Deployed
) -> None:
    computes_what_pytorch_computes(network, target, precision, deployed)


@pytest.mark.parametrize("network", OTHERS)
def test_the_document_has_the_promised_keys(network: str, deployed: Deployed) -> None:
    has_the_promised_keys(network, deployed)
