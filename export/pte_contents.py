"""What a .pte file holds, read back from its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

METHOD = "forward"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "CHAR": "int8"}  # ExecuTorch's names of dtypes -> numpy's


@dataclass(frozen=True)
class PteContents:
    """How often `forward` calls a delegate, and how often, by name, an operation outside the delegates.

    `constants` are the bytes of the constant tensors: the delegates' weights, which are `named`, and the program's own.
    `payloads` are what the delegates are handed, by the delegates' name; `outside_dtypes` counts what the operations
    outside make.
    `texts` are what the methods that return a text return. `inputs` and `outputs` of `forward` are (dtype, shape).
    """

    delegates: int
    outside: Mapping[str, int]
    constants: frozenset[bytes]
    named: Mapping[str, bytes]
    payloads: tuple[tuple[str, bytes], ...]
    outside_dtypes: Mapping[str, int]
    texts: Mapping[str, str]
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]


def pte_contents(data: bytes) -> PteContents:
    """The contents of the .pte file `data`."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall, String, Tensor

    file = deserialize_pte_binary(data)
    (plan,) = (plan for plan in file.program.execution_plan if plan.name == METHOD)
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    outside = Counter(plan.operators[call.op_index].name for call in calls if isinstance(call, KernelCall))
    makes = [plan.values[call.args[-1]].val for call in calls if isinstance(call, KernelCall)]
    names = Counter(DTYPES.get(value.scalar_type.name, "other") for value in makes if isinstance(value, Tensor))
    store = file.named_data
    named = {key: bytes(store.buffers[one.buffer_index]) for key, one in store.pte_data.items()} if store else {}
    return PteContents(
        sum(isinstance(call, DelegateCall) for call in calls),
        outside,
        frozenset([*named.values(), *map(bytes, (item.storage for item in file.program.constant_buffer))]),
        named,
        tuple(
            (delegate.id, bytes(file.program.backend_delegate_data[delegate.processed.index].data))
            for delegate in plan.delegates
        ),
        names,
        {
            plan.name: value.val.string_val
            for plan in file.program.execution_plan
            for value in (plan.values[index] for index in plan.outputs)
            if isinstance(value.val, String)
        },
        *(
            tuple(
                (DTYPES.get(value.scalar_type.name, "other"), tuple(value.sizes))
                for value in (plan.values[index].val for index in indices)
                if isinstance(value, Tensor)
            )
            for indices in (plan.inputs, plan.outputs)
        ),
    )
