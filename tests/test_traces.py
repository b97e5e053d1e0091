"""A graph is traced once in a block, anew outside of one, and never for another network or precision."""

from __future__ import annotations

import pytest
from folded_networks import folded_network

from castling_deploy.export.to_executorch import program_of
from castling_deploy.export.to_onnx import exported_program
from castling_deploy.target import Precision
from castling_deploy.traces import remembered, traced_once


def test_a_key_is_traced_once_in_a_block_and_anew_outside() -> None:
    made: list[int] = []

    def trace() -> int:
        made.append(0)
        return len(made)

    with traced_once():
        assert [remembered("it", trace), remembered("it", trace), remembered("other", trace)] == [1, 1, 2]
    assert [remembered("it", trace), remembered("it", trace)] == [3, 4]
    with pytest.raises(ZeroDivisionError), traced_once():
        assert remembered("it", trace) == 5
        raise ZeroDivisionError
    assert remembered("it", trace) == 6


def test_lowered_and_exported_are_one_graph() -> None:
    network, another = folded_network("levit"), folded_network("deit")
    with traced_once():
        assert exported_program(network, dynamic=False) is exported_program(network, dynamic=False)
        assert exported_program(network, dynamic=False) is not exported_program(another, dynamic=False)
    assert exported_program(network, dynamic=False) is not exported_program(network, dynamic=False)


def test_xnnpack_is_handed_the_graph_that_was_judged() -> None:
    pytest.importorskip("executorch")
    network = folded_network("levit")
    with traced_once():
        single = program_of(network, Precision.FP32)
        assert program_of(network, Precision.FP32) is single
        assert program_of(network, Precision.FP16) is not single
