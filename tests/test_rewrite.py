"""A rebuilt network shares its storage with the original and nothing else."""

from __future__ import annotations

import torch
from networks import small
from torch import nn

from castling_deploy.rewrite import copied, rebuilt


def test_a_copy_computes_the_same_on_the_same_storage() -> None:
    network = small("levit")
    twin = copied(network)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
    for (name, one), two in zip(network.named_parameters(), twin.parameters()):
        assert one.data_ptr() == two.data_ptr() and one is not two, name


def test_nothing_done_to_a_copy_reaches_the_original() -> None:
    network = small("levit")
    before = {name: (value.dtype, value.clone()) for name, value in network.state_dict().items()}
    twin = copied(network).half().train()
    del twin.stages[0].blocks[0]  # type: ignore[union-attr, index]
    twin.head.register_forward_hook(lambda module, inputs, output: output * 0)  # type: ignore[union-attr, operator]
    twin.extra = nn.Linear(1, 1)
    assert not network.training and not hasattr(network, "extra")
    assert network(torch.randn(1, 3, 64, 64)).abs().max() > 0
    for name, value in network.state_dict().items():
        assert (value.dtype, True) == (before[name][0], torch.equal(value, before[name][1]))


def test_children_come_before_their_parents_and_paths_are_dotted() -> None:
    seen: list[str] = []

    def step(path: str, module: nn.Module) -> nn.Module:
        seen.append(path)
        return module

    rebuilt(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())), step)
    assert seen == ["0", "1.0", "1", ""]
