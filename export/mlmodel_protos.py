"""The messages of a Core ML package, as coremltools ships them, without the rest of coremltools."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

ALIAS = "castling_deploy_mlmodel"


def messages(name: str) -> Any:
    """The module `name` of coremltools.proto: "Model_pb2", "MIL_pb2".

    Importing coremltools takes 6 s of CPU: it imports what it converts, scikit-learn, ExecuTorch and torchao too where
    they are. Its messages import each other by relative names and protobuf alone, so that they can be loaded as a
    package of their own: 0.1 s, for everybody who only reads a package. protobuf knows a message by its content, and
    takes it twice where coremltools is imported later.
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
