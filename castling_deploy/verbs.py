"""`castling_deploy.castle`, `.fold`, `.export` and `.models.castlify` are modules and verbs of the Python interface.

Importing a submodule binds its name in the package, so a function of the same name would vanish behind it. These
modules are therefore callable: the call goes to the function of that name in `castling_deploy.api`, or in the module.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A module that can be called; `verb_home` names the module with the function."""

    verb_home: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(self.verb_home), name)(*args, **options)


def make_callable(module: str, home: str = "castling_deploy.api") -> None:
    """Let the module of this name be called, in place."""
    verb = sys.modules[module]
    verb.__class__ = Verb
    assert isinstance(verb, Verb)
    verb.verb_home = home
