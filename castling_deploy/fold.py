"""Folding: normalisations and constants disappear into the weights next to them, exactly.

Here is the algebra (computed in float64, stored in the network's own dtype) and the walk over the network. Which folds
apply is said by the modules themselves: a module that is `Foldable` returns its folded twin. The equations are numbered
as in `docs/folds.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from castling_deploy.errors import FoldError
from castling_deploy.rewrite import copied, rebuilt
from castling_deploy.verbs import make_callable


@dataclass(frozen=True)
class FoldStep:
    """One fold that was applied: the rule's name and the module it made."""

    path: str
    rule: str


@runtime_checkable
class Foldable(Protocol):
    """A module that knows an exact, cheaper twin of itself; its children are folded before it."""

    @property
    def fold_rule(self) -> str:
        """The fold's name."""

    def folded(self) -> nn.Module:
        """The twin; the module itself is not changed. Raises FoldError where the fold would not be exact."""


def fold(model: nn.Module, on_step: Callable[[FoldStep], None] = lambda step: None) -> nn.Module:
    """A new network with every fold applied, in eval mode; `model` is not changed.

    `on_step` hears of each fold. Raises FoldError when a BatchNorm is left, or normalises by batch statistics.
    """

    def step(path: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, Foldable):
            return module
        try:
            twin = module.folded()
        except FoldError as error:
            raise FoldError(f"{error.message} at {path or 'the network itself'}", hint=error.hint) from error
        on_step(FoldStep(path, module.fold_rule))
        return twin.eval()

    with torch.no_grad():
        folded = rebuilt(model, step)
    folded.training = False
    left = [path for path, module in folded.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if left:
        plural = "BatchNorm module was" if len(left) == 1 else "BatchNorm modules were"
        raise FoldError(
            f"{len(left)} {plural} not folded: {', '.join(left)}",
            hint="add a fold rule (`folded`) to the module that owns them",
        )
    return folded


Affine = tuple[torch.Tensor, torch.Tensor]
Weighted = TypeVar("Weighted", nn.Linear, nn.Conv2d)


def batchnorm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Affine:
    """(scale, shift), float64 (C,): what an eval-mode BatchNorm does to each channel, x * scale + shift."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise FoldError(
            f"{type(norm).__name__}({norm.num_features}) normalises by batch statistics",
            hint="call model.eval() before fold()",
        )
    gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight
    beta = torch.zeros(norm.num_features) if norm.bias is None else norm.bias
    scale = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, beta.double() - norm.running_mean.double() * scale


def layernorm_affine(norm: nn.LayerNorm) -> Affine:
    """(scale, shift), float64 (C,): the affine part of a LayerNorm over C channels."""
    size = norm.normalized_shape
    gamma = torch.ones(size) if norm.weight is None else norm.weight
    beta = torch.zeros(size) if norm.bias is None else norm.bias
    return gamma.double(), beta.double()


def without_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The LayerNorm with its affine part gone (to be folded into every consumer, rule 7)."""
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False).eval()


class ZeroMeanNorm(nn.LayerNorm):
    """A LayerNorm without affine part of tokens (..., C) whose mean over C is zero already (rule 31).

    What it returns is what a LayerNorm returns; an exporter may leave out the subtraction of the mean.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        self.eval()


def weighted_like(op: Weighted, weight: torch.Tensor, bias: torch.Tensor | None) -> Weighted:
    """A Linear or Conv2d with the geometry and dtype of `op` and new parameters (float64 accepted)."""
    dtype = op.weight.dtype
    if isinstance(op, nn.Linear):
        twin: nn.Linear | nn.Conv2d = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        geometry: dict[str, Any] = {
            "stride": op.stride,
            "padding": op.padding,
            "dilation": op.dilation,
            "groups": op.groups,
            "padding_mode": op.padding_mode,
        }
        twin = nn.Conv2d(
            weight.shape[1] * op.groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            bias=bias is not None,
            device="meta",
            **geometry,
        )
    twin.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        twin.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return twin.eval()  # type: ignore[return-value]  # the type of `op`, by construction


def _bias(op: nn.Linear | nn.Conv2d) -> torch.Tensor:
    zeros = torch.zeros(op.weight.shape[0], dtype=torch.float64)
    return zeros if op.bias is None else op.bias.double()


def affine_after(op: Weighted, affine: Affine) -> Weighted:
    """op, then x * scale + shift per output channel, as one op (rules 1 and 2): W' = s W, b' = s b + t."""
    scale, shift = affine
    weight = op.weight.double() * scale.view(-1, *[1] * (op.weight.ndim - 1))  # (C_out, C_in[/groups, kH, kW])
    return weighted_like(op, weight, _bias(op) * scale + shift)


def affine_after_transposed(op: nn.ConvTranspose2d, affine: Affine) -> nn.ConvTranspose2d:
    """A transposed convolution, then x * scale + shift per output channel, as one op (rule 1).

    Its weight is (C_in, C_out / groups, kH, kW): the output channels of group g are dimension 1 of the g-th part of
    dimension 0, so the scale goes there.
    """
    scale, shift = affine
    parts = op.weight.double().unflatten(0, (op.groups, -1))  # (groups, C_in / groups, C_out / groups, kH, kW)
    weight = (parts * scale.view(op.groups, 1, -1, 1, 1)).flatten(0, 1)
    bias = shift if op.bias is None else op.bias.double() * scale + shift
    twin = copied(op)
    assert isinstance(twin, nn.ConvTranspose2d)
    twin.weight = nn.Parameter(weight.to(op.weight.dtype), requires_grad=False)
    twin.bias = nn.Parameter(bias.to(op.weight.dtype), requires_grad=False)
    return twin.eval()


def affine_before(op: nn.Linear, affine: Affine) -> nn.Linear:
    """x * scale + shift per input channel, then op, as one op (rules 3 and 7): W' = W diag(s), b' = b + W t."""
    scale, shift = affine
    weight = op.weight.double()  # (C_out, C_in)
    return weighted_like(op, weight * scale, _bias(op) + weight @ shift)


def scaled(op: Weighted, factor: float) -> Weighted:
    """op times a constant, as one op: W' = c W, b' = c b."""
    return weighted_like(op, op.weight.double() * factor, None if op.bias is None else op.bias.double() * factor)


def centred(op: Weighted) -> Weighted:
    """op, then minus the mean over its output channels, as one op (rule 31): W' = W - mean(W), b' = b - mean(b).

    Raises FoldError for a grouped convolution: the mean takes what other groups read.
    """
    if isinstance(op, nn.Conv2d) and op.groups > 1:
        raise FoldError("the mean over the channels of a grouped convolution is none of its own")
    weight, bias = op.weight.double(), _bias(op)
    return weighted_like(op, weight - weight.mean(0), None if op.bias is None else bias - bias.mean())


def rows(op: nn.Linear, index: torch.Tensor) -> nn.Linear:
    """The output channels of op listed in index (rule 29), in that order."""
    return weighted_like(op, op.weight[index], None if op.bias is None else op.bias[index])


def mean_of(heads: Sequence[nn.Linear]) -> nn.Linear:
    """The average of Linears on the same input, as one Linear (rule 5)."""
    weight = torch.stack([head.weight.double() for head in heads]).mean(0)
    return weighted_like(heads[0], weight, torch.stack([_bias(head) for head in heads]).mean(0))


def mean_of_each(heads: Sequence[nn.Linear]) -> nn.Linear:
    """The average of Linears on one token each, as one Linear on the concatenated tokens (rule 6)."""
    weight = torch.cat([head.weight.double() / len(heads) for head in heads], dim=1)
    return weighted_like(heads[0], weight, torch.stack([_bias(head) for head in heads]).mean(0))


make_callable(__name__)
