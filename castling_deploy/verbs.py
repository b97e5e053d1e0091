"""`castling_deploy.castle`, `.fold` and `.export` are modules and verbs of the Python interface at once.

Importing a submodule binds its name in the package, so a function of the same name would vanish behind it. These three
modules are therefore callable: the call goes to the function of that name in `castling_deploy.api`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A module that can be called."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("castling_deploy.api"), name)(*args, **options)


def make_callable(module: str) -> None:
    """Let the module of this name be called, in place."""
    sys.modules[module].__class__ = Verb
