"""What waits for a ladder gets its parts as they come, or the error that ended the climb."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import small
from torch import nn

from castling_deploy.climbing import Climbing, Told
from castling_deploy.ladder import Ladder, climb
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import probes_for
from castling_deploy.task import task_named


def test_the_folded_network_is_there_before_the_ladder_and_is_the_ladders() -> None:
    network = small("levit")
    climbing, told = Climbing(network), threading.Event()
    seen: list[nn.Module] = []

    def wait() -> None:
        seen.append(climbing.folded)
        assert len(climbing.few.tensors)
        told.set()

    def climbed(network: nn.Module, tell: Told) -> Ladder:
        def heard(folded: nn.Module, few: object) -> None:
            tell(folded, few)  # type: ignore[arg-type]
            assert told.wait(60)  # while nothing was run yet

        probes = probes_for(Preprocessing((64, 64)), None).few(2)
        return climb(network, task_named("classification"), ("logits",), probes, told=heard)

    waiting = threading.Thread(target=wait)
    waiting.start()
    ladder = climbing.run(climbed)
    waiting.join()
    assert climbing.ladder is ladder and seen == [climbing.folded]
    for mine, theirs in zip(climbing.folded.parameters(), ladder.folded.parameters(), strict=True):
        assert mine is not theirs and mine.data_ptr() == theirs.data_ptr()
    assert climbing.few.tensors is ladder.few.tensors


def test_who_waits_for_a_climb_that_fails_gets_its_error() -> None:
    climbing = Climbing(nn.Linear(1, 1))

    def failed(network: nn.Module, tell: Told) -> Ladder:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        climbing.run(failed)
    for part in ("folded", "few", "ladder"):
        with pytest.raises(KeyboardInterrupt):
            getattr(climbing, part)


def test_nothing_of_the_trained_network_is_kept() -> None:
    climbing = Climbing(nn.Linear(4, 4))
    assert climbing.weight_bytes == 4 * (16 + 4) and climbing.in_training
    kept: list[torch.Tensor] = []

    def climbed(network: nn.Module, tell: Told) -> Ladder:
        kept.append(network.weight)  # type: ignore[arg-type]
        return None  # type: ignore[return-value]

    climbing.run(climbed)
    assert not any(value is not None and isinstance(value, nn.Module) for value in vars(climbing).values())
