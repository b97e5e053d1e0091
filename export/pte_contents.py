"""What a .pte file holds, read back from its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

METHOD = "forward"


@dataclass(frozen=True)
class PteContents:
    """How often `forward` calls a delegate, and how often, by name, an operation outside the delegates.

    `constants` are the bytes of the constant tensors: the delegates' weights, and the program's own.
    """

    delegates: int
    outside: Mapping[str, int]
    constants: frozenset[bytes]


def pte_contents(data: bytes) -> PteContents:
    """The contents of the .pte file `data`."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    file = deserialize_pte_binary(data)
    (plan,) = (plan for plan in file.program.execution_plan if plan.name == METHOD)
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    outside = Counter(plan.operators[call.op_index].name for call in calls if isinstance(call, KernelCall))
    named = file.named_data.buffers if file.named_data else []
    return PteContents(
        sum(isinstance(call, DelegateCall) for call in calls),
        outside,
        frozenset(map(bytes, [*named, *(item.storage for item in file.program.constant_buffer)])),
    )
