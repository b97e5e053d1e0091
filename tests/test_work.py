"""How much of the probes a large network runs on, and what is told where memory ends."""

from __future__ import annotations

import click
import numpy as np
import pytest
import torch
from networks import small
from torch import nn

from castling_deploy import bundled, ladder
from castling_deploy.castle import measure_cast
from castling_deploy.checkpoint import read
from castling_deploy.cli import run
from castling_deploy.errors import TargetUnavailableError
from castling_deploy.identify import identify
from castling_deploy.ladder import climb, within_work
from castling_deploy.parity import Verdict
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import LEAST, Probes, probes_for
from castling_deploy.task import task_named
from castling_deploy.work import work_of


def probes() -> Probes:
    return probes_for(Preprocessing((32, 32)), None)


class Counting:
    """How many images a network itself was called with, not one of its copies, which inherit the hook."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.images = network, 0
        network.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.images += len(inputs[0]) if module is self.network else 0


def test_a_network_without_labels_runs_on_as_many_probes_as_its_work_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    network, all_of_them = small("deit"), probes()
    macs = work_of(network, (1, 3, 32, 32)).macs
    assert within_work(network, all_of_them) is all_of_them
    monkeypatch.setattr(ladder, "WORK", 12 * macs)
    few = within_work(network, all_of_them)
    assert (len(few.tensors), few.real, few.extremes) == (12, 6, 2)
    monkeypatch.setattr(ladder, "WORK", macs // 2)
    least = within_work(network, all_of_them)
    assert (len(least.tensors), least.real, least.extremes) == (LEAST + 2, LEAST, 1)
    for kept in (few, least, few.few(4).at_most(5)):
        assert np.array_equal(all_of_them.tensors[all_of_them.rows(kept)], kept.tensors)


def test_where_labels_are_known_all_probes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network, card = identify(read(bundled.checkpoint_path("castling-deit-digits")))
    labelled = probes_for(card.preprocessing, card.samples)
    monkeypatch.setattr(ladder, "WORK", 1)
    assert within_work(network, labelled) is labelled


def test_the_trained_network_runs_once_and_tells_its_evidence_on_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    network, all_of_them = small("deit"), probes()
    expected = measure_cast(network, torch.from_numpy(all_of_them.tensors[: all_of_them.real]))
    seen = Counting(network)
    climbed = climb(network, task_named("classification"), ("logits",), all_of_them)
    assert seen.images == len(all_of_them.tensors) and climbed.layers == expected
    monkeypatch.setattr(ladder, "WORK", 1)
    seen.images = 0
    least = climb(network, task_named("classification"), ("logits",), all_of_them)
    assert seen.images == len(least.telling.tensors) == len(least.few.tensors) == LEAST + 2
    assert least.layers == measure_cast(network, torch.from_numpy(all_of_them.tensors[:LEAST]))
    assert len(least.references["logits"].outputs) == len(all_of_them.tensors), "what artefacts are compared with"
    assert least.references["logits"].spread == climbed.references["logits"].spread
    assert least.references["logits"].noise == pytest.approx(climbed.references["logits"].noise, rel=0.9)
    assert least.fold_rung.verdict is Verdict.PASS and least.cast_rung.rel is not None


def test_the_ladder_keeps_neither_the_trained_nor_the_cast_network() -> None:
    climbed = climb(small("deit"), task_named("classification"), ("logits",), probes())
    assert [name for name, value in vars(climbed).items() if isinstance(value, nn.Module)] == ["folded"]


@pytest.mark.parametrize("bound", [torch.empty, np.empty])
def test_a_machine_without_memory_is_told_so(bound: object, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        bound(2**55)  # type: ignore[operator]

    assert run(command, [], "castling") == TargetUnavailableError.exit_code
    told = capsys.readouterr().err
    assert "no memory" in told and "--imgsz" in told and "internal failure" not in told
    assert "134217728.0 GiB" in told or bound is not torch.empty
