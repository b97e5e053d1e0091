"""Softmax baselines: the families with their original attention, never taken for Castling networks, folded exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import BASELINES, SMALL_MVIT, conditioned, small

from castling_deploy.castle import castle, measure_cast
from castling_deploy.errors import CheckpointError
from castling_deploy.fold import fold
from castling_deploy.models.deit_family import DeiTFamily
from castling_deploy.models.family import attention_of, families, family_of, names_baseline
from castling_deploy.models.mvit import CastlingMViTv2
from castling_deploy.models.mvit_config import MViTv2Config, place_of


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def noise(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *BASELINES[name][1].image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BASELINES)
def test_a_softmax_network_is_taken_only_where_it_is_asked_for(name: str) -> None:
    tensors = small(name).state_dict()
    assert attention_of(tensors) == "softmax"
    with pytest.raises(CheckpointError, match="softmax network") as caught:
        family_of(tensors)
    family = family_of(tensors, softmax=True)
    assert f"--model (e.g. {next(iter(baselines(family)))})" in (caught.value.hint or "")
    size = small(name).config.image_size  # type: ignore[union-attr]
    assert family.config_of(tensors, size, 0.02) == BASELINES[name][1]  # type: ignore[arg-type]


def baselines(family: object) -> list[str]:
    return [name for name, config in family.variants.items() if config.attention == "softmax"]  # type: ignore[attr-defined]


def test_every_variant_has_its_baseline_and_a_model_name_tells_which_is_meant() -> None:
    for family in (family for family in families() if family.baseline is not None):
        names = baselines(family)
        assert [f"castling-{name}" for name in names] == [name for name in family.variants if name not in names]
        assert family.name == f"castling-{family.baseline}"
        assert all(map(names_baseline, [family.baseline, *names]))
        assert not any(names_baseline(f"castling-{name}") for name in [family.baseline, *names])


@pytest.mark.parametrize("name", BASELINES)
def test_the_cast_changes_nothing_of_a_softmax_network(name: str) -> None:
    network = small(name)
    castled = castle(network)
    assert castled.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(castled(noise(name)), network(noise(name)), rtol=0, atol=0)
    assert measure_cast(network, noise(name)) == ()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BASELINES)
def test_fold_of_a_softmax_network_is_exact_in_float64(name: str, seed: int) -> None:
    network, x = small(name, seed).double(), noise(name).double()
    assert relative(fold(network)(x), network(x)) < 1e-12


def test_folded_softmax_networks_compute_no_index_and_gather_no_table() -> None:
    for name in ("levit-softmax", "mvit-softmax"):
        program = torch.export.export(fold(small(name)), (noise(name, 1),))
        targets = {str(node.target) for node in program.graph.nodes}
        assert not {"aten.arange.default", "aten.index.Tensor"} & targets


@pytest.mark.parametrize("name", BASELINES)
def test_softmax_networks_run_at_other_sizes(name: str) -> None:
    network = small(name)
    family = family_of(network.state_dict(), softmax=True)
    tensors, config = family.resized(network.state_dict(), network.config, (96, 64))
    resized = family.build(config).eval()
    resized.load_state_dict(dict(tensors))
    assert resized(torch.randn(2, 3, 96, 64)).shape == (2, 10)


def test_the_baseline_of_mvit_pools_its_keys_as_published() -> None:
    config = MViTv2Config(attention="softmax")
    keys = [place_of(config, stage, block).keys for stage in range(4) for block in range(2)]
    assert [height for height, _ in keys] == [14, 14, 28, 14, 28, 14, 14, 7]


def test_mvit_without_relative_positions_folds_exactly() -> None:
    config = replace(SMALL_MVIT, attention="softmax", positions=False)
    network, x = conditioned(CastlingMViTv2(config)).double(), noise("mvit-softmax").double()
    assert relative(fold(network)(x), network(x)) < 1e-12


def test_heads_that_a_softmax_deit_does_not_tell_are_an_error() -> None:
    tensors = conditioned(DeiTFamily().build(replace(BASELINES["deit-softmax"][1], width=96))).state_dict()  # type: ignore[type-var]
    with pytest.raises(CheckpointError, match="96 channels do not tell the number of heads"):
        DeiTFamily().config_of(tensors, None, 0.02)
