"""Rebuild a network without touching it: the one traversal that both `castle` and `fold` use."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn


def rebuilt(module: nn.Module, step: Callable[[str, nn.Module], nn.Module], path: str = "") -> nn.Module:
    """A new tree: children first, then every module replaced by `step(path, module)`.

    What `step` is handed is already a copy whose children are rebuilt. Storage is shared with the original, parameters
    and hooks are not: `.half()` or a hook on the copy leaves the original as it was.
    """
    twin = copy.copy(module)
    for name, value in vars(twin).items():
        if isinstance(value, (dict, set)):  # hooks and buffer names: a copy's own, not the original's
            vars(twin)[name] = value.copy()
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for name, parameter in module._parameters.items()
    }
    twin._modules = {
        name: None if child is None else rebuilt(child, step, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    return step(path, twin)


def copied(module: nn.Module) -> nn.Module:
    """A new tree with the same storage."""
    return rebuilt(module, lambda _, twin: twin)
