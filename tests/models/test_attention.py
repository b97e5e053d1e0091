"""The attention against the golden vector of the official module, and its forms against each other."""

from __future__ import annotations

import pytest
import torch

from castling_deploy.castle import castle
from castling_deploy.errors import FoldError, ShapeError
from castling_deploy.fold import fold
from castling_deploy.models.attention import (
    FoldedAttention,
    LinearAngularAttention,
    linear_angular,
    masked,
    token_conv,
    unit,
    value_scale,
)

ALL = slice(None)
# One head, three tokens, D = 2, a token convolution of three taps: computed by the official module in float64.
Q, K, V = ([[1, 0], [0, 1], [1, 1]], [[1, 0], [1, 1], [0, 2]], [[1, 2], [3, -1], [0, 1]])
GOLDEN = {
    None: [[1.82677787, 0.78687257], [1.68296111, 0.11618635], [1.10914714, 0.68760608]],
    0.02: [[1.93884778, 0.64436605], [1.69864136, 0.35210973], [1.19967361, 0.53656317]],
    0.40: [[1.96311260, 0.60501153], [1.69698822, 0.37755317], [1.24102284, 0.43834304]],
}


@pytest.mark.parametrize("threshold", GOLDEN)
def test_core_reproduces_the_golden_vector_of_the_official_module(threshold: float | None) -> None:
    q, k, v = (torch.tensor(rows, dtype=torch.float64)[None, None] for rows in (Q, K, V))
    dconv = token_conv(1, 3).double()
    dconv.weight.data = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(1, 1, 3, 1)
    core = linear_angular(q, k, v)
    if threshold is not None:
        core = core + masked(LinearAngularAttention.logits(q, k)(ALL).softmax(-1), threshold) @ v
    torch.testing.assert_close(
        (unit(core) + dconv(v))[0, 0], torch.tensor(GOLDEN[threshold], dtype=torch.float64), rtol=0, atol=1e-7
    )


def attention(tokens: int = 60, threshold: float | None = 0.02) -> tuple[LinearAngularAttention, torch.Tensor]:
    torch.manual_seed(0)
    module = LinearAngularAttention(32, 4, qkv_bias=True, aux_threshold=threshold, tokens=tokens).double().eval()
    return module, torch.randn(2, tokens, 32, dtype=torch.float64)


def test_state_dict_has_the_names_and_shapes_of_the_official_module() -> None:
    module = LinearAngularAttention(32, 4)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "qkv.weight": (96, 32),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
        "dconv.weight": (4, 1, 9, 1),
    }


def test_cast_removes_only_the_masked_softmax_term() -> None:
    module, x = attention()
    castled = castle(module)
    q, k, v = module.split(x)
    without = module.proj((unit(linear_angular(q, k, v)) + module.dconv(v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(castled(x), without, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(module(x), castled(x), atol=1e-3)
    assert module.aux_threshold == 0.02, "the cast changed the module it was given"


def test_cast_is_exact_where_no_softmax_entry_exceeds_the_threshold() -> None:
    module, x = attention(threshold=1.0)
    torch.testing.assert_close(castle(module)(x), module(x), rtol=0, atol=0)


def test_evidence_counts_the_mask_and_says_when_it_cannot_vanish() -> None:
    module, x = attention(tokens=49)
    evidence = module.cast_evidence(x)
    assert evidence is not None and not evidence.can_vanish, "every softmax row of 49 entries has one above 1/49 > 0.02"
    q, k, v = module.split(x)
    weights = masked(module.logits(q, k)(ALL).softmax(-1), 0.02)
    assert evidence.mask_density == pytest.approx((weights > 0).double().mean().item())
    core = linear_angular(q, k, v)
    assert evidence.contribution_max == pytest.approx(((weights @ v).norm(dim=-1) / core.norm(dim=-1)).max().item())
    long, y = attention(tokens=50)
    assert long.cast_evidence(y).can_vanish  # type: ignore[union-attr]
    assert castle(module).cast_evidence(x) is None  # type: ignore[operator]


@pytest.mark.parametrize("tokens", [5, 60, 197])
def test_folded_form_is_exact_in_float64(tokens: int) -> None:
    module, x = attention(tokens)
    castled = castle(module)
    expected, actual = castled(x), fold(castled)(x)
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-12


def test_folded_form_stays_finite_in_float16_at_197_tokens() -> None:
    """Unscaled, ||o||^2 of correlated values of this size passes 65504."""
    module, _ = attention(197)
    torch.manual_seed(1)
    x = torch.randn(1, 1, 32, dtype=torch.float64) * 8 + torch.randn(1, 197, 32, dtype=torch.float64)
    _, _, v = module.split(x)
    q, k, _ = module.split(x)
    assert linear_angular(q, k, v).square().sum(-1).max() > 65504
    half = fold(castle(module)).half()(x.half())
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.double(), castle(module)(x), rtol=2e-2, atol=2e-2)


def test_zero_tokens_give_zero_not_nan() -> None:
    module = LinearAngularAttention(32, 4, aux_threshold=None, tokens=10)
    for form in (module, fold(module)):
        assert torch.isfinite(form(torch.zeros(1, 10, 32))).all()


def test_folding_before_the_cast_is_refused() -> None:
    module, _ = attention()
    with pytest.raises(FoldError, match="auxiliary branch is still there"):
        fold(module)


@pytest.mark.parametrize(
    ("tokens", "scale"), [(1, 1), (4, 1 / 2), (64, 1 / 8), (65, 1 / 16), (197, 1 / 16), (3136, 1 / 64)]
)
def test_values_are_scaled_by_the_power_of_two_at_or_below_the_root(tokens: int, scale: float) -> None:
    assert value_scale(tokens) == scale


def test_scaling_the_values_costs_no_rounding() -> None:
    castled = castle(attention(197)[0]).float()
    folded = fold(castled)
    assert isinstance(folded, FoldedAttention) and isinstance(castled, LinearAngularAttention)
    assert torch.equal(folded.value.weight * 16, castled.qkv.weight[64:])
    assert torch.equal(folded.dconv.weight / 16, castled.dconv.weight)


@pytest.mark.parametrize(("arguments", "message"), [((30, 4), "30 channels"), ((32, 4, False, 8), "8 taps")])
def test_impossible_shapes_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        LinearAngularAttention(*arguments)  # type: ignore[arg-type]
