"""A Core ML package is read without the rest of coremltools, and beside it; its converter comes alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from castling_deploy.export.coremltools_parts import messages

pytest.importorskip("coremltools")

ALONE = """
import sys
from castling_deploy.export.coremltools_parts import converter, messages
message = messages("Model_pb2").Model(specificationVersion=8)
message.description.metadata.userDefined["a"] = "b"
assert "coremltools" not in sys.modules
{later}
print(messages("Model_pb2").Model.FromString(message.SerializeToString()) == message)
"""
LATER = """
assert converter().convert and converter() is sys.modules["coremltools"]
assert "sklearn" not in sys.modules and "executorch" not in sys.modules
import executorch
assert messages("Model_pb2").__name__[:4] == "core"
"""


@pytest.mark.parametrize("later", ["", LATER], ids=["alone", "before the converter"])
def test_messages_come_alone_and_the_converter_without_what_else_it_could_convert(later: str) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE.format(later=later)], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_where_coremltools_is_imported_its_messages_are_used() -> None:
    from coremltools.proto import MIL_pb2

    assert messages("MIL_pb2") is MIL_pb2
