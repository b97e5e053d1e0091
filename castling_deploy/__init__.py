"""castling-deploy takes a trained Castling-ViT to phones, browsers and GPUs, and proves what it ships.

    network = castling_deploy.load("checkpoint.safetensors")       # training form; no path: the bundled one
    folded = castling_deploy.fold(castling_deploy.castle(network))
    result = castling_deploy.export(network, target="coreml", precision="fp16")
    castling_deploy.verify(result.path)
    castling_deploy.save(network, "checkpoint.safetensors", overwrite=True)   # tensors, and what they do not tell
    model = castling_deploy.open(result.path)                      # numpy in, numpy out, whatever the target
    logits = model(images)

Importing this package imports neither torch nor a toolchain; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castling_deploy import castle, export, fold
    from castling_deploy.api import benchmark, load, open, save, verify

__all__ = ["benchmark", "castle", "export", "fold", "load", "open", "save", "verify"]

_MODULES = ("castle", "export", "fold")  # callable modules, see castling_deploy.verbs


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'castling_deploy' has no attribute '{name}'")
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"castling_deploy.{name}")
    return getattr(importlib.import_module("castling_deploy.api"), name)
