"""Which module an operation of an exported graph is from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

# Operations with a sum over an axis in them, as torch.export names them before and after its decompositions.
REDUCTIONS = frozenset(
    {
        "_adaptive_avg_pool2d",
        "_softmax",
        "adaptive_avg_pool2d",
        "layer_norm",
        "linalg_vector_norm",
        "mean",
        "native_layer_norm",
        "softmax",
        "sum",
    }
)
REPEATED = re.compile(r"@\d+")  # torch.export's mark of a module that is called again


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose calls are open where the node stands, the network ("") first."""
    stack = node.meta.get("nn_module_stack", {})
    return ("", *(unnumbered(path) for path, _ in stack.values() if path))


def unnumbered(path: str) -> str:
    """A module's path without the number of the call."""
    return REPEATED.sub("", path)


def module_of(name: str) -> str:
    """The module's path in the name of an ONNX node, "blocks.0.attn.query/MatMul_7"."""
    return unnumbered(name.rpartition("/")[0])


def kind(node: fx.Node) -> str:
    """The operation's name without its library and its overload: "linear" of aten.linear.default."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def inside(path: str, modules: Iterable[str]) -> bool:
    """Whether the module `path` is one of the modules, or in one of them."""
    return any(not module or path == module or path.startswith(module + ".") for module in modules)
