"""Some tokens at a time: the same numbers, and nothing that needs one token alone is left outside of the parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import CLASSIFIER, MODEL, exported
from folded_networks import folded_network, images_for, logits_of
from onnx_numbers import exactly, unoptimised
from torch import nn

from castling_deploy import verify
from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export import onnx_attest
from castling_deploy.export.onnx_graphs import every_graph
from castling_deploy.export.onnx_norms import with_lp_norms
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.onnx_parts import in_parts, part_of
from castling_deploy.export.onnx_stored import StoredSession, stored, witness
from castling_deploy.export.onnx_types import checked, inferred
from castling_deploy.export.to_onnx import onnx_model
from castling_deploy.int8.held import misheld
from castling_deploy.int8.quantised import quantised
from castling_deploy.parity import Verdict
from castling_deploy.target import Artifact, Network, Precision, target_named
from castling_deploy.witnesses.qnn import QnnHost

# Tokens: 26, 16 and 4 and 1, 24 and 6, 385 and 97 and 25.
AT_ONCE = {"deit-distilled": 13, "levit": 8, "levit-linear": 8, "mvit": 100}


@cache
def written(name: str, batch: int) -> bytes:
    return inferred(with_lp_norms(onnx_model(folded_network(name, batch), Precision.FP32, 20))).SerializeToString()


def whole(network: Network) -> onnx.ModelProto:
    return onnx.load_from_string(written(network.name, network.inputs[0].shape[0]))


def parted(network: Network) -> onnx.ModelProto:
    return checked(inferred(in_parts(whole(network), AT_ONCE[network.name])))


@pytest.mark.parametrize(("name", "batch"), [*((name, 1) for name in AT_ONCE), ("deit-distilled", 2)])
def test_parts_change_no_number(name: str, batch: int) -> None:
    network = folded_network(name, batch)
    given, made = whole(network), parted(network)
    assert any(node.op_type == "Scan" for node in made.graph.node)
    if batch == 1:
        np.testing.assert_allclose(unoptimised(made, network), unoptimised(given, network), rtol=0, atol=2e-6)
    np.testing.assert_allclose(exactly(made, network), exactly(given, network), rtol=1e-12, atol=1e-13)


def test_only_what_needs_all_tokens_is_outside() -> None:
    graph = parted(folded_network("deit-distilled")).graph
    linears = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    outside = Counter(node.op_type for node in graph.node)
    multiplied = [node for node in graph.node if node.op_type == "MatMul"]
    # the last block asks for two tokens, which are fewer than a part: its query, output and the MLP
    assert sum(not linears.isdisjoint(node.input) for node in multiplied) == 4 and outside["Gelu"] == 1
    bodies = [body for body in every_graph(graph) if body.name == "tokens"]
    assert [len(body.input) for body in bodies] == [1, 5]  # tokens; tokens, q, u, the convolution, and k^T u for all
    assert all(value.type.tensor_type.shape.dim for body in bodies for value in body.value_info)


@pytest.mark.parametrize(("tokens", "at_once", "size"), [(4097, 256, 241), (4096, 256, 256), (100, 256, 100)])
def test_a_part_is_the_largest_divisor(tokens: int, at_once: int, size: int) -> None:
    assert part_of(tokens, at_once) == size


def test_a_number_without_such_a_divisor_is_refused_with_one_that_is() -> None:
    with pytest.raises(ExportError, match=r"4098 tokens .* of 64 to 256.*--tokens-at-once 683"):
        part_of(4098, 256)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder, network = tmp_path_factory.mktemp("parts"), folded_network("deit-distilled")
    options = OnnxOptions(tokens_at_once=AT_ONCE[network.name])
    return folder, target_named("onnx").export(network, Precision.FP32, options, folder)


def test_an_artefact_in_parts_is_verified_as_any_other() -> None:
    folder = exported(CLASSIFIER, "onnx", "int8", tokens_at_once=16)
    usual = exported(CLASSIFIER, "onnx", "int8")
    assert verify(folder.path).verdict is Verdict.PASS
    assert folder.artifact.details["products"] == usual.artifact.details["products"]
    assert folder.artifact.details["nodes"]["Scan"] > 1


def test_float16_inside_of_bodies_is_kept_where_it_is_stored(tmp_path: Path) -> None:
    network, target = folded_network("deit-distilled"), target_named("onnx")
    artifact = target.export(network, Precision.FP16, OnnxOptions(tokens_at_once=AT_ONCE[network.name]), tmp_path)
    assert not target.attest(tmp_path, artifact, Precision.FP16).problems
    bodies = [body for body in every_graph(stored(onnx.load(tmp_path / MODEL)).graph) if body.name == "tokens"]
    assert bodies and all(any(node.output[0].endswith("/stored") for node in body.node) for body in bodies)
    images = images_for(network, 1)
    got = StoredSession(tmp_path / MODEL, witness())({"image": images})["logits"]
    np.testing.assert_allclose(got, logits_of(network, images), atol=2e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone_in_levels_are_loaded_and_read_back(bits: int, tmp_path: Path) -> None:
    folded, target = folded_network("deit-distilled"), target_named("onnx")
    options = OnnxOptions(activations="float32", weight_bits=bits, tokens_at_once=AT_ONCE[folded.name])
    linears = [path for path, module in folded.module.named_modules() if isinstance(module, nn.Linear)]
    levels = replace(options.form, ranges=dict.fromkeys(linears, (0.0, 0.0)))
    network = replace(folded, quantisation=levels)
    target.export(network, Precision.INT8, options, tmp_path)
    assert not misheld(target, tmp_path, network)
    images = images_for(network, 1)
    with target.load(tmp_path) as session, torch.no_grad():
        got = session({"image": images})["logits"]
        wanted = quantised(network.module, levels)(torch.from_numpy(images)).numpy()
    assert np.abs(got - wanted).max() < 3e-2 * np.abs(wanted).max()
    model = onnx.load(tmp_path / MODEL)
    body = next(body for body in every_graph(model.graph) if body.name == "tokens")
    scales = {node.input[1] for node in body.node if node.op_type == "DequantizeLinear"}
    tensor = next(tensor for tensor in body.initializer if tensor.name in scales)
    tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / MODEL)
    assert len(misheld(target, tmp_path, network)) == 2  # it is not there, and something else is


def test_what_a_body_computes_in_is_read_back(artefact: tuple[Path, Artifact], tmp_path: Path) -> None:
    folder, artifact = artefact
    model = onnx.load(folder / MODEL)
    body = next(body for body in every_graph(model.graph) if body.name == "tokens")
    product = next(node for node in body.node if node.op_type == "MatMul")
    before, behind, position = list(product.input), product.output[0], list(body.node).index(product)
    halves, product.output[0] = [f"{name}/half" for name in before], f"{behind}/half"
    product.input[:] = halves
    cast = partial(onnx.helper.make_node, "Cast")
    body.node.insert(position + 1, cast([product.output[0]], [behind], to=onnx.TensorProto.FLOAT))
    for name, half in zip(before, halves, strict=True):
        body.node.insert(position, cast([name], [half], to=onnx.TensorProto.FLOAT16))
    onnx.save(model, tmp_path / MODEL)
    assert not onnx_attest.attest(folder / MODEL, artifact, Precision.FP32).problems
    found = onnx_attest.attest(tmp_path / MODEL, artifact, Precision.FP32)
    assert any("1 in fp16" in problem for problem in found.problems), found.problems


def test_a_body_that_is_not_well_typed_is_an_error_of_ours() -> None:
    """Ours reads of what is around it weights alone."""
    made = parted(folded_network("deit-distilled"))
    body = next(body for body in every_graph(made.graph) if body.name == "tokens")
    body.node.append(onnx.helper.make_node("Identity", [made.graph.node[0].output[0]], ["copy"]))
    with pytest.raises(ExportError, match="not well typed"):
        inferred(made)


def test_an_npu_without_scan_is_not_asked(artefact: tuple[Path, Artifact]) -> None:
    _, artifact = artefact
    missing = QnnHost().unfit(artifact)
    assert missing is not None and "--tokens-at-once" in missing.fix
    assert QnnHost().unfit(exported(CLASSIFIER, "onnx", "fp32").artifact) is None


def test_a_network_of_few_tokens_is_left_whole_and_that_is_said(tmp_path: Path) -> None:
    network = folded_network("levit")
    options = OnnxOptions(tokens_at_once=16)
    details = target_named("onnx").export(network, Precision.FP32, options, tmp_path).details
    assert (
        "no part of this network has more than 16 tokens at once" in details["notes"] and "Scan" not in details["nodes"]
    )


def test_less_than_a_token_and_an_open_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="0 tokens at once"):
        OnnxOptions(tokens_at_once=0)
    with pytest.raises(UsageError, match="leave out --dynamic or --tokens-at-once"):
        target_named("onnx").refuse(OnnxOptions(tokens_at_once=256, dynamic=True), 1)
