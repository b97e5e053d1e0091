"""Castling networks: one file per family, and `castlify` for networks of timm. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castling_deploy.models.castlify import castlify

__all__ = ["castlify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'castling_deploy.models' has no attribute '{name}'")
    import importlib

    return importlib.import_module(f"castling_deploy.models.{name}")  # a callable module, see castling_deploy.verbs
