"""The softmax of many tokens is computed in slices of queries: the same numbers, and never the whole map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import small
from torch.utils._python_dispatch import TorchDispatchMode

from castling_deploy.castle import measure_cast
from castling_deploy.models import attention
from castling_deploy.models.mvit_attention import PoolingAttention
from castling_deploy.models.mvit_config import MViTv2Config, place_of
from castling_deploy.work import work_of

NAMES = ("deit", "levit", "levit-linear", "mvit", "levit-softmax", "mvit-softmax")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor):
                self.bytes = max(self.bytes, item.nbytes)
        return result


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_queries_make_the_same_outputs_and_the_same_evidence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small(name).double()
    x = torch.randn(2, 3, *network.config.image_size, dtype=torch.float64)  # type: ignore[misc, union-attr]
    whole, evidence = network(x), measure_cast(network, x)
    monkeypatch.setattr(attention, "MAP_BYTES", 2000)  # of one query to a third of them
    torch.testing.assert_close(network(x), whole, rtol=0, atol=1e-13)
    for one, other in zip(measure_cast(network, x), evidence, strict=True):
        assert vars(one.evidence) == pytest.approx(vars(other.evidence), rel=1e-12)


def test_what_is_differentiated_is_not_sliced_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small("mvit").double()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(attention, "MAP_BYTES", 2000)
    with torch.no_grad():
        sliced = network(x)
    whole = network(x)
    torch.testing.assert_close(whole, sliced, rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(whole.square().sum(), x)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (network(x + step).square().sum() - network(x - step).square().sum()) / 2e-6
    torch.testing.assert_close(rise, gradient.norm(), rtol=1e-5, atol=0)


@torch.no_grad()
def test_no_tensor_is_as_large_as_the_map() -> None:
    """2 images of 4096 tokens: the map takes 134 MB, a slice 4 MB, the queries, keys and values 9 MB."""
    config = MViTv2Config(image_size=(256, 256))
    module = PoolingAttention(place_of(config, 0, 0), config).eval()
    x = torch.randn(2, 4096, 96)
    with Largest() as seen:
        module(x)
        module.cast_evidence(x)
    assert seen.bytes == 3 * x.nbytes > attention.MAP_BYTES


def test_counting_work_leaves_the_network_where_it_is() -> None:
    """The weights are not touched, and could not be: they stay where they are."""
    network = small("mvit")
    for parameter in network.parameters():
        parameter.data.fill_(float("nan"))
    before = dict(network.named_parameters())
    assert work_of(network, (1, 3, 64, 96)) == work_of(small("mvit"), (1, 3, 64, 96))
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}


def test_a_traced_network_is_not_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user exports by himself, and is compared with, has one softmax for every attention."""
    monkeypatch.setattr(attention, "MAP_BYTES", 2000)
    network = small("mvit-softmax")
    x = torch.zeros(1, 3, *network.config.image_size)  # type: ignore[misc, union-attr]
    with torch.no_grad():
        program = torch.export.export(network, (x,))
    softmaxes = sum("softmax" in str(node.target) for node in program.graph.nodes)
    assert softmaxes == sum(isinstance(module, PoolingAttention) for module in network.modules())
