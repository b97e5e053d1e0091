"""A Core ML package is read without the rest of coremltools, and beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from castling_deploy.export.mlmodel_protos import messages

pytest.importorskip("coremltools")

ALONE = """
import sys
from castling_deploy.export.mlmodel_protos import messages
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
