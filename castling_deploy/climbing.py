"""A ladder while it is climbed: what is exported is known long before what it has to compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from torch import nn

from castling_deploy.ladder import Ladder
from castling_deploy.probes import Probes
from castling_deploy.rewrite import copied

Told = Callable[[nn.Module, Probes], None]


class Climbing:
    """Others wait for its parts in threads of their own; where the climb fails, they get its error."""

    def __init__(self, network: nn.Module) -> None:
        """`network` is in training form and eval mode; nothing of it is kept once it is climbed."""
        self._network: nn.Module | None = network
        self.in_training = network.training
        self.weight_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
        self._folded: Future[tuple[nn.Module, Probes]] = Future()
        self._ladder: Future[Ladder] = Future()

    def run(self, climb: Callable[[nn.Module, Told], Ladder]) -> Ladder:
        """`climb(network, told)`, which tells the folded network and `Ladder.few` as soon as it has them."""
        network, self._network = self._network, None
        assert network is not None
        try:
            ladder = climb(network, lambda folded, few: self._folded.set_result((copied(folded), few)))
        except BaseException as error:
            for part in (self._folded, self._ladder):
                if not part.done():
                    part.set_exception(error)
            raise
        self._ladder.set_result(ladder)
        return ladder

    @property
    def folded(self) -> nn.Module:
        """The folded network, its modules others than the ladder's: while torch traces one (`range_audit`), it holds
        tensors without values.
        """
        return self._folded.result()[0]

    @property
    def few(self) -> Probes:
        """The probes that float64 is affordable on."""
        return self._folded.result()[1]

    @property
    def ladder(self) -> Ladder:
        """All of it."""
        return self._ladder.result()
