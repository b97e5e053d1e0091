"""Folding is exact in real arithmetic: 1e-12 relative in float64, over random statistics; leftovers are errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import BASELINES, SMALL, conditioned, small
from torch import nn

from castling_deploy import fold as algebra
from castling_deploy.castle import castle
from castling_deploy.errors import FoldError
from castling_deploy.fold import FoldStep, fold
from castling_deploy.models.mvit_attention import Pooled

Images = Callable[[nn.Module, int], torch.Tensor]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SMALL)
def test_fold_of_a_whole_network_is_exact_in_float64(name: str, seed: int, images: Images) -> None:
    castled = castle(small(name, seed)).double()
    x = images(castled, 3)
    assert relative(fold(castled)(x), castled(x)) < 1e-12


def random_norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], channels: int) -> nn.Module:
    return conditioned(nn.Sequential(kind(channels)))[0].double()  # type: ignore[index]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_then_batchnorm_is_one_conv(groups: int, bias: bool) -> None:
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups, bias=bias).double()
    norm = random_norm(nn.BatchNorm2d, 12)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    folded = algebra.affine_after(conv, algebra.batchnorm_affine(norm))
    assert folded.groups == groups and folded.stride == (2, 2)
    assert relative(folded(x), norm(conv(x))) < 1e-12


def test_linear_then_batchnorm_is_one_linear() -> None:
    linear, norm = nn.Linear(8, 5, bias=False).double(), random_norm(nn.BatchNorm1d, 5)
    x = torch.randn(6, 8, dtype=torch.float64)
    assert relative(algebra.affine_after(linear, algebra.batchnorm_affine(norm))(x), norm(linear(x))) < 1e-12


def test_batchnorm_then_linear_is_one_linear() -> None:
    norm, linear = random_norm(nn.BatchNorm1d, 8), nn.Linear(8, 5).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    assert relative(algebra.affine_before(linear, algebra.batchnorm_affine(norm))(x), linear(norm(x))) < 1e-12


def test_layernorm_affine_goes_into_the_next_linear_and_makes_its_bias() -> None:
    norm = conditioned(nn.Sequential(nn.LayerNorm(8, eps=1e-6)))[0].double()  # type: ignore[index]
    linear = nn.Linear(8, 5, bias=False).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    folded = algebra.affine_before(linear, algebra.layernorm_affine(norm))
    assert folded.bias is not None
    assert relative(folded(algebra.without_affine(norm)(x)), linear(norm(x))) < 1e-12


def test_heads_on_one_token_merge_into_their_mean_and_on_two_into_one_wide_linear() -> None:
    heads = [nn.Linear(8, 5).double() for _ in range(2)]
    x, y = torch.randn(2, 4, 8, dtype=torch.float64)
    assert relative(algebra.mean_of(heads)(x), (heads[0](x) + heads[1](x)) / 2) < 1e-12
    both = torch.cat([x, y], dim=1)
    assert relative(algebra.mean_of_each(heads)(both), (heads[0](x) + heads[1](y)) / 2) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_centring_takes_the_mean_over_channels_out_of_what_an_operation_returns(bias: bool) -> None:
    x, image = torch.randn(3, 8, dtype=torch.float64), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    linear = nn.Linear(8, 6, bias).double()
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias).double()
    for op, given in ((linear, x), (conv, image)):
        exact = op(given)
        assert relative(algebra.centred(op)(given), exact - exact.mean(1, keepdim=True)) < 1e-12


def test_a_grouped_convolution_cannot_be_centred() -> None:
    with pytest.raises(FoldError, match="grouped"):
        algebra.centred(nn.Conv2d(4, 6, 3, groups=2))


@pytest.mark.parametrize("name", [*SMALL, *BASELINES])
def test_a_norm_that_promises_tokens_without_mean_is_given_such(name: str, images: Images) -> None:
    castled = castle(small(name)).double()
    folded = fold(castled)
    promised = [module for module in folded.modules() if isinstance(module, algebra.ZeroMeanNorm)]
    assert bool(promised) == name.startswith("deit")
    means: list[float] = []
    for module in promised:
        module.register_forward_pre_hook(
            lambda _, given: means.append((given[0].mean(-1).abs().max() / given[0].std()).item())
        )
    folded(images(castled, 2))
    assert len(means) == len(promised) and max(means, default=0.0) < 1e-13


def test_rows_and_scaling_keep_what_they_select() -> None:
    linear = nn.Linear(8, 6).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    index = torch.tensor([4, 0, 2])
    assert relative(algebra.rows(linear, index)(x), linear(x)[:, index]) < 1e-12
    assert relative(algebra.scaled(linear, 0.25)(x), linear(x) * 0.25) < 1e-12


def test_folding_changes_neither_the_network_nor_its_dtype(network: nn.Module) -> None:
    castled = castle(network)
    before = {name: value.clone() for name, value in castled.state_dict().items()}
    folded = fold(castled)
    assert all(torch.equal(value, before[name]) for name, value in castled.state_dict().items())
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {torch.float32}


def test_every_norm_is_gone_or_without_affine_but_for_those_of_pooled_heads(network: nn.Module) -> None:
    folded = fold(castle(network))
    for path, module in folded.named_modules():
        assert not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        pooled = isinstance(folded.get_submodule(path.rpartition(".")[0]), Pooled)
        assert not isinstance(module, nn.LayerNorm) or module.weight is None or pooled


def test_steps_name_rule_and_place() -> None:
    steps: list[FoldStep] = []
    fold(castle(small("levit")), steps.append)
    assert FoldStep("stem.conv1", "Conv+BN") in steps
    assert FoldStep("stages.0.blocks.0.attn", "attention constants") in steps
    assert FoldStep("", "heads merged") in steps


def test_a_batchnorm_that_nobody_folds_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))).eval()
    with pytest.raises(FoldError, match=r"2 BatchNorm modules were not folded: 1, 2\.0"):
        fold(model)


def test_batch_statistics_are_refused() -> None:
    network = castle(small("levit")).train()
    with pytest.raises(FoldError, match=r"batch statistics at stem\.conv1") as caught:
        fold(network)
    assert caught.value.hint == "call model.eval() before fold()"


def test_folding_twice_changes_nothing(network: nn.Module, images: Images) -> None:
    once = fold(castle(network)).double()
    x = images(network, 2)
    torch.testing.assert_close(fold(once)(x), once(x), rtol=0, atol=0)
