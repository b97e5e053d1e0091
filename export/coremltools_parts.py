"""coremltools in parts: its messages alone, and its converter without what else it could convert."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

ALIAS = "castling_deploy_mlmodel"
OTHER_SOURCES = ("executorch", "sklearn")


def converter() -> Any:
    """coremltools, imported as where the packages of OTHER_SOURCES are not: 0.9 s of CPU instead of 3.9.

    coremltools 9.0 imports them for networks of theirs alone, scikit-learn for its trees and ExecuTorch for its
    programs. Who imported one of them before keeps it.
    """
    hidden: dict[str, Any] = {name: None for name in OTHER_SOURCES if name not in sys.modules}
    sys.modules.update(hidden)  # an import of None is an ImportError
    try:
        return importlib.import_module("coremltools")
    finally:
        for name in hidden:
            del sys.modules[name]


def messages(name: str) -> Any:
    """The module `name` of coremltools.proto: "Model_pb2", "MIL_pb2".

    Importing coremltools takes 1 s of CPU and more (see `converter`). Its messages import each other by relative names
    and protobuf alone, so that they can be loaded as a package of their own: 0.1 s, for everybody who only reads a
    package. protobuf knows a message by its content, and takes it twice where coremltools is imported later.
    """
    if "coremltools" in sys.modules:
        return importlib.import_module(f"coremltools.proto.{name}")
    if ALIAS not in sys.modules:
        found = find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'coremltools'", name="coremltools")
        package = ModuleSpec(ALIAS, None, is_package=True)
        package.submodule_search_locations = [str(Path(one, "proto")) for one in found.submodule_search_locations]
        sys.modules[ALIAS] = module_from_spec(package)
    return importlib.import_module(f"{ALIAS}.{name}")
