"""The rung between the fold and the artefact: what a target rewrites is exact, and the rung can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from networks import small
from torch import nn

from castling_deploy.artifact import network_for
from castling_deploy.checkpoint import Checkpoint
from castling_deploy.identify import ModelCard, identify
from castling_deploy.ladder import Ladder, climb
from castling_deploy.parity import Verdict
from castling_deploy.probes import probes_for
from castling_deploy.target import TARGETS, Network, target_named
from castling_deploy.task import task_named
from castling_deploy.verification import lowered_rung


def climbed(name: str) -> tuple[ModelCard, Ladder]:
    tensors = {key: value for key, value in small(name).state_dict().items() if not key.endswith("tracked")}
    size = list(small(name).config.image_size)  # type: ignore[union-attr, arg-type]
    network, card = identify(Checkpoint(Path("random"), None, tensors, card={"image_size": size}))
    probes = probes_for(card.preprocessing, card.samples).few(8)
    return card, climb(network, task_named(card.task), card.outputs, probes)


@pytest.mark.parametrize("name", ["deit", "levit", "levit-linear", "mvit"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_target_rewrites_is_exact(target: str, name: str) -> None:
    one = target_named(target)
    if (missing := one.missing()) is not None:
        pytest.skip(missing.reason)
    card, ladder = climbed(name)
    rung = lowered_rung(one, network_for(card, ladder.folded, 1), one.options(), ladder)
    assert rung.verdict is Verdict.PASS, rung


def test_a_batch_that_does_not_divide_the_probes_is_filled_up() -> None:
    one = target_named("onnx")
    card, ladder = climbed("deit")
    assert lowered_rung(one, network_for(card, ladder.folded, 3), one.options(), ladder).verdict is Verdict.PASS


class Careless:
    """A target whose rewriting forgets something small: one weight of the head is off by a thousandth."""

    def __init__(self) -> None:
        self._target = target_named("onnx")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def lowered(self, network: Network, options: Any) -> nn.Module:
        module = self._target.lowered(network, options)
        weights = dict(module.named_parameters())
        weights[max(weights, key=lambda name: name.endswith("head.weight"))].data[0, 0] *= 1.001
        return module


def test_a_rewriting_that_is_not_exact_fails() -> None:
    card, ladder = climbed("deit")
    careless: Any = Careless()
    network = network_for(card, ladder.folded, 1)
    assert lowered_rung(careless, network, careless.options(), ladder).verdict is Verdict.FAIL
