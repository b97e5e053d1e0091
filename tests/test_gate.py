"""The gate is tested: defects that exports really have are planted, and every one of them must be caught.

Each is planted in the network that is handed to a real exporter; the artefact is run by its real witness and compared
with the untouched reference, as in every export.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from castling_deploy import bundled
from castling_deploy.artifact import network_for
from castling_deploy.castle import castle
from castling_deploy.checkpoint import read
from castling_deploy.fold import fold
from castling_deploy.identify import ModelCard, identify
from castling_deploy.ladder import Ladder, climb
from castling_deploy.models.attention import FoldedAttention
from castling_deploy.models.mvit_attention import FoldedPoolingAttention, Pooled
from castling_deploy.parity import ParityReport, Verdict
from castling_deploy.probes import probes_for
from castling_deploy.rewrite import copied
from castling_deploy.target import Precision, target_named
from castling_deploy.task import task_named
from castling_deploy.verification import verify_artifact

Defect = Callable[[nn.Module], nn.Module]
LEVIT, DEIT = "castling-levit-digits", "castling-deit-digits"


def deep(network: nn.Module) -> nn.Module:
    """A copy whose tensors may be changed."""
    twin = copied(network)
    for parameter in twin.parameters():
        parameter.data = parameter.data.clone()
    return twin


def attention(network: nn.Module, index: int = 1) -> FoldedAttention | FoldedPoolingAttention:
    kinds = (FoldedAttention, FoldedPoolingAttention)
    return [module for module in network.modules() if isinstance(module, kinds)][index]


def linear(part: nn.Linear | Pooled) -> nn.Linear:
    """The projection of queries, keys or values, pooled after it or not."""
    return part.linear if isinstance(part, Pooled) else part


def swapped_query_and_key(network: nn.Module) -> nn.Module:
    module = attention(network)
    module.query, module.key = module.key, module.query
    return network


def dropped_bias(network: nn.Module) -> nn.Module:
    linear(attention(network).value).bias = None
    return network


def reversed_token_convolution(network: nn.Module) -> nn.Module:
    module = attention(network).dconv
    module.weight.data = module.weight.data.flip(2)
    return network


def dropped_token_convolution(network: nn.Module) -> nn.Module:
    attention(network).dconv.weight.data.zero_()
    return network


def heads_split_in_the_wrong_order(network: nn.Module) -> nn.Module:
    """Rows taken as (channel, head) where they are (head, channel)."""
    module = attention(network)
    heads = module.dconv.weight.shape[0]
    for layer in (linear(module.query), linear(module.key)):
        layer.weight.data = layer.weight.data.unflatten(0, (heads, -1)).transpose(0, 1).flatten(0, 1)
    return network


def constant_lost(network: nn.Module) -> nn.Module:
    """The kernel's 1 / pi taken for 1: the values weigh too little."""
    module = attention(network)
    value = module.value.norm if isinstance(module.value, Pooled) else module.value
    value.weight.data *= 1 / torch.pi
    value.bias.data *= 1 / torch.pi
    module.dconv.weight.data *= torch.pi
    module.register_forward_hook(lambda module, inputs, output: output * 1.05)
    return network


class Before(nn.Module):
    """Something done to the input first."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor], network: nn.Module) -> None:
        super().__init__()
        self.change, self.network = change, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(self.change(x))


def bgr(network: nn.Module) -> nn.Module:
    return Before(lambda x: x.flip(1), network)


def wrong_mean(network: nn.Module) -> nn.Module:
    return Before(lambda x: x + 0.02, network)


def wrong_std(network: nn.Module) -> nn.Module:
    return Before(lambda x: x * 1.02, network)


def divided_by_255_twice(network: nn.Module) -> nn.Module:
    return Before(lambda x: x / 255, network)


def crop_off_by_one(network: nn.Module) -> nn.Module:
    return Before(lambda x: x.roll(1, dims=3), network)


def height_and_width_exchanged(network: nn.Module) -> nn.Module:
    return Before(lambda x: x.transpose(2, 3), network)


def clipped_activations(network: nn.Module) -> nn.Module:
    """What an int8 range that is too small by two does to the inputs of a layer."""
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(-0.5, 0.5),))
    return network


def one_row_of_one_weight_zero(network: nn.Module) -> nn.Module:
    [module for module in network.modules() if isinstance(module, nn.Linear)][5].weight.data[3] = 0
    return network


class TanhGelu(nn.Module):
    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def tanh_gelu(network: nn.Module) -> nn.Module:
    for block in network.blocks:  # type: ignore[union-attr]
        block.mlp = TanhGelu(block.mlp.fc1, block.mlp.fc2)
    return network


def last_block_missing(network: nn.Module) -> nn.Module:
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    blocks = [each for each in lists if hasattr(each[-1], "attn")][-1]
    del blocks[-1]
    return network


def batchnorm_with_a_wrong_eps(trained: nn.Module) -> nn.Module:
    castled = deep(castle(trained))
    for module in castled.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eps = 1e-3
    return fold(castled)


def one_batchnorm_dropped(trained: nn.Module) -> nn.Module:
    castled = deep(castle(trained))
    norm = castled.get_submodule("stages.1.blocks.0.mlp.ln1.bn")
    norm.weight.data, norm.bias.data = torch.ones_like(norm.weight), torch.zeros_like(norm.bias)  # type: ignore[arg-type]
    return fold(castled)


def only_one_head(trained: nn.Module) -> nn.Module:
    castled = copied(castle(trained))
    castled.head_dist = castled.head
    return fold(castled)


ON_FOLDED = (
    swapped_query_and_key,
    dropped_bias,
    reversed_token_convolution,
    dropped_token_convolution,
    heads_split_in_the_wrong_order,
    constant_lost,
    bgr,
    wrong_mean,
    wrong_std,
    divided_by_255_twice,
    crop_off_by_one,
    height_and_width_exchanged,
    clipped_activations,
    one_row_of_one_weight_zero,
    last_block_missing,
)
ON_TRAINED = (batchnorm_with_a_wrong_eps, one_batchnorm_dropped, only_one_head)
Bundled = Callable[[str], tuple[nn.Module, ModelCard, Ladder]]


@pytest.fixture(scope="module")
def trained() -> Bundled:
    """A bundled network with its ladder on 24 digits and the structured images, climbed once."""
    known: dict[str, tuple[nn.Module, ModelCard, Ladder]] = {}

    def get(name: str) -> tuple[nn.Module, ModelCard, Ladder]:
        if name not in known:
            network, card = identify(read(bundled.checkpoint_path(name)))
            probes = probes_for(card.preprocessing, card.samples).few(24)
            known[name] = network, card, climb(network, task_named(card.task), card.outputs, probes)
        return known[name]

    return get


def verified(
    mutant: nn.Module,
    card: ModelCard,
    ladder: Ladder,
    folder: Path,
    name: str = "onnx",
    precision: Precision = Precision.FP32,
) -> ParityReport:
    target = target_named(name)
    artifact = target.export(network_for(card, mutant, 1), precision, target.options(), folder)
    return verify_artifact(target, artifact, folder, ladder, precision)


@pytest.mark.parametrize("network", bundled.CHECKPOINTS)
@pytest.mark.parametrize("defect", ON_FOLDED)
def test_a_defect_in_the_exported_network_is_caught(
    defect: Defect, network: str, trained: Bundled, tmp_path: Path
) -> None:
    _, card, ladder = trained(network)
    assert verified(defect(deep(ladder.folded)), card, ladder, tmp_path).verdict is Verdict.FAIL


@pytest.mark.parametrize("defect", ON_TRAINED)
def test_a_defect_in_the_fold_is_caught(defect: Defect, trained: Bundled, tmp_path: Path) -> None:
    network, card, ladder = trained(LEVIT)
    assert verified(defect(network), card, ladder, tmp_path).verdict is Verdict.FAIL


def test_an_approximate_gelu_is_caught(trained: Bundled, tmp_path: Path) -> None:
    _, card, ladder = trained(DEIT)
    assert verified(tanh_gelu(deep(ladder.folded)), card, ladder, tmp_path).verdict is Verdict.FAIL


@pytest.mark.parametrize("defect", [swapped_query_and_key, dropped_token_convolution, bgr, divided_by_255_twice])
@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_gross_defects_are_caught_in_fp16_too(target: str, defect: Defect, trained: Bundled, tmp_path: Path) -> None:
    _, card, ladder = trained(LEVIT)
    report = verified(defect(deep(ladder.folded)), card, ladder, tmp_path, target, Precision.FP16)
    assert report.verdict is Verdict.FAIL


@pytest.mark.parametrize("network", bundled.CHECKPOINTS)
def test_the_untouched_network_is_no_false_alarm(network: str, trained: Bundled, tmp_path: Path) -> None:
    _, card, ladder = trained(network)
    assert verified(deep(ladder.folded), card, ladder, tmp_path).verdict is Verdict.PASS
