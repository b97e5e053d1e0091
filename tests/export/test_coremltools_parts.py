"""A Core ML package is read without the rest of coremltools, and beside it; its converter comes alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from castling_deploy.export.coremltools_parts import messages

pytest.importorskip("coremltools")

ALONE = """
import sys
from castling_deploy.export.coremltools_parts import messages
message = messages("Model_pb2").Model(specificationVersion=8)
message.description.metadata.userDefined["a"] = "b"
assert "coremltools" not in sys.modules
{later}
print(messages("Model_pb2").Model.FromString(message.SerializeToString()) == message)
"""


@pytest.mark.parametrize("later", ["", "import coremltools; assert messages('Model_pb2').__name__[:4] == 'core'"])
def test_messages_are_read_before_coremltools_is_imported(later: str) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE.format(later=later)], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_where_coremltools_is_imported_its_messages_are_used() -> None:
    from coremltools.proto import MIL_pb2

    assert messages("MIL_pb2") is MIL_pb2


def test_the_converter_comes_without_what_else_it_could_convert_and_that_can_be_imported_after_it() -> None:
    script = """
import sys
from castling_deploy.export.coremltools_parts import converter
converter()
print("convert" in dir(sys.modules["coremltools"]), "sklearn" in sys.modules, "executorch" in sys.modules)
import sklearn
print(converter() is sys.modules["coremltools"], sklearn.__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "False", "True", "sklearn"], done.stderr
